"""The engine of a comparison, on real runs of a real (tiny) model: what is kept, resumed, added, refused, lost and tried again."""

import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import loratory as lt
from loratory.cli import main
from loratory.compare import worker
from loratory.compare.budget import NotTimed
from loratory.compare.definition import define
from loratory.compare.engine import Work, place_of, read_comparison, run_comparison
from loratory.compare.jobs import Job
from loratory.compare.local_pool import LocalPool
from loratory.compare.results import FILE, Results
from loratory.compare.settings import presets, read_compare
from loratory.compare.splits import fingerprint, read_splits
from loratory.train.settings import read_settings

STORIES = Path(__file__).parents[1] / "models" / "stories260k"


def write_rows(folder):
    folder.mkdir()
    for split, count in (("train", 13), ("dev", 3), ("test", 4)):
        rows = [
            {"prompt": f"{split} place {i}, area {i % 3}", "completion": f"It is there. {'Yes. ' * (i % 3)}"}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def keys(data, out, **changes):
    usual = {
        "base": str(STORIES), "train": str(data), "out": str(out), "max_length": 64, "max_steps": 4, "eval_steps": 2,
        "per_device_train_batch_size": 4, "device": "cpu", "methods": "lora rank=2,frozen", "rates": [1e-3, 1e-2], "seeds": 2,
        "search_seeds": 1, "pool": 2, "threads": 1, "retries": 1,
    }  # fmt: skip
    return usual | changes


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished comparison: its folder, its data, what was said."""
    place = tmp_path_factory.mktemp("compare")
    data, said = write_rows(place / "data"), []
    run_comparison(read_compare(keys(data, place / "out")), say=said.append, command="loratory compare ...")
    return place / "out", data, said


@pytest.fixture
def copy(finished, tmp_path):
    """The same, to be changed. Its runs stay where they were made."""
    out, data, _ = finished
    shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns("runs", "plots"))
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "out", tmp_path / "data"


def test_rates_are_chosen_on_dev_and_the_chosen_alone_are_measured_on_test(finished):
    comparison = read_comparison(finished[0])
    lora = [run for run in comparison.runs if run.method == "lora rank=2"]
    tried = {run.learning_rate: run.dev["token_loss"] for run in lora if run.seed == 0}
    assert set(tried) == {1e-3, 1e-2}
    assert comparison.chosen == {"lora rank=2": min(tried, key=tried.get), "frozen": 0.0}
    for run in comparison.runs:
        assert run.status == "done"
        assert (run.test is not None) == (run.learning_rate == comparison.chosen[run.method])
        assert run.test_each is None or len(run.test_each) == 4
    assert {(run.learning_rate, run.seed) for run in lora} == {
        (1e-3, 0),
        (1e-2, 0),
        (comparison.chosen["lora rank=2"], 1),
    }
    assert all(
        run.trained > 0 and run.steps == 4 and run.peak_memory > 10**7 and run.adapter_bytes > 4 * run.trained
        for run in lora
    )
    assert [step for step, _ in lora[0].loss_curve] == [1, 2, 3, 4]
    assert comparison.rows == {"train": 13, "dev": 3, "test": 4}
    assert comparison.test_texts[0] == "test place 0, area 0"
    assert any("of 1 methods is at the edge of those tried" in warning for warning in comparison.warnings)


def test_a_chosen_run_is_what_train_gives_alone(finished, tmp_path):
    from loratory.train import train

    comparison = read_comparison(finished[0])
    run = next(run for run in comparison.runs if run.test is not None and run.method == "lora rank=2" and run.seed == 1)
    alone = train(None, say=lambda text: None, **{**run.settings, "output_dir": str(tmp_path / "alone")})
    assert alone.after == pytest.approx(run.dev, abs=1e-6)


def test_progress_names_each_run_and_the_time_left(finished):
    said = finished[2]
    assert sum(line.startswith("started") for line in said) == 9
    ends = [line for line in said if line.startswith("[")]
    assert ends[-1].startswith("[9/9]")
    assert all("left" in line for line in ends)
    assert any("token_loss" in line and "on dev" in line for line in ends)


def test_again_runs_nothing_and_new_methods_run_alone(finished):
    out, data, _ = finished
    said = []
    run_comparison(read_compare(keys(data, out)), say=said.append)
    assert not any(line.startswith("started") for line in said)
    before = {(run.method, run.learning_rate, run.seed): run for run in read_comparison(out).runs}
    run_comparison(read_compare(keys(data, out, methods="lora rank=1")), say=said.append)
    started = [line for line in said if line.startswith("started")]
    assert len(started) == 5
    assert all("lora rank=1" in line for line in started)
    after = read_comparison(out)
    assert after.methods == ["lora rank=2", "frozen", "lora rank=1"]
    assert {
        (run.method, run.learning_rate, run.seed): run for run in after.runs if run.method != "lora rank=1"
    } == before


def test_changed_rows_are_refused(copy):
    out, data = copy
    with (data / "dev.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt": "one more", "completion": "Yes."}) + "\n")
    with pytest.raises(ValueError, match=r"the rows have changed since .* was begun .*dev 3 then, 4 now"):
        run_comparison(read_compare(keys(data, out)), say=print)


def test_another_comparison_is_refused(copy):
    out, data = copy
    with pytest.raises(
        ValueError, match="holds another comparison: max_steps was 4, now 5; methods, seeds and rates may be added"
    ):
        run_comparison(read_compare(keys(data, out, max_steps=5)), say=print)
    table = {"frozen": {"method": "lora", "rank": 3}}
    with pytest.raises(ValueError, match=r"'frozen' was .* \(give the new one a label of its own"):
        run_comparison(read_compare(keys(data, out, methods=table)), say=print)


def test_another_schema_is_refused_and_left_alone(copy):
    out, data = copy
    connection = sqlite3.connect(out / FILE)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    before = (out / FILE).read_bytes()
    with pytest.raises(
        ValueError, match="has results of schema 7, but this version of loratory reads schema 1; use the version"
    ):
        run_comparison(read_compare(keys(data, out)), say=print)
    assert (out / FILE).read_bytes() == before
    (out / FILE).write_text("no database")
    with pytest.raises(ValueError, match="no results file of a comparison"):
        read_comparison(out)


def test_results_are_only_added_to(copy):
    connection = sqlite3.connect(copy[0] / FILE)
    for statement in ("DELETE FROM runs", "UPDATE tests SET body = ''"):
        with pytest.raises(sqlite3.IntegrityError, match="results are only added to"):
            connection.execute(statement)
    connection.close()


def test_the_report_is_built_again_from_the_results_file(copy, capsys):
    out = copy[0]
    (out / "report.md").unlink()
    assert main(["compare", str(out)]) == 0
    assert "lora rank=2" in (out / "report.md").read_text()
    assert main(["compare", str(out / "nothing")]) == 2
    assert "holds no comparison" in capsys.readouterr().err


def test_a_diverged_and_a_failed_run_are_marked_and_the_others_go_on(tmp_path):
    data, said = write_rows(tmp_path / "data"), []
    table = {
        "wild": {"method": "lora", "rank": 2, "rates": [1e-3, 1e38]},
        "late": {
            "method": "lora",
            "rank": 2,
            "rates": [1e20],
            "max_steps": 1,
            "warmup_steps": 0,
        },  # finite; no score is
        "broken": {"method": "lora", "rank": 4096, "rates": [1e-3]},
        "frozen": {},
    }
    settings = read_compare(keys(data, tmp_path / "out", methods=table, rates=None, seeds=1, search_seeds=None))
    comparison = run_comparison(settings, say=said.append)
    status = {(run.method, run.learning_rate): run.status for run in comparison.runs}
    assert status == {
        ("wild", 1e-3): "done",
        ("wild", 1e38): "diverged",
        ("late", 1e20): "diverged",
        ("broken", 1e-3): "failed",
        ("frozen", 0.0): "done",
    }
    assert comparison.chosen == {"wild": 1e-3, "frozen": 0.0}
    assert "token_loss on dev is nan or inf after the last step" in [run.error for run in comparison.runs]
    started = [line for line in said if line.startswith("started")]
    assert sum("broken" in line for line in started) == 2  # once more, as retries says
    assert sum("late" in line for line in started) == 1
    assert any("no learning rate of broken finished" in warning for warning in comparison.warnings)
    assert any("rank 4096 is too large" in str(run.error) for run in comparison.runs)


def worker_of(out, name, seconds=60.0):
    """The process number of a run, once it trains."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for file in out.glob(f"runs/{name}*/train.pid"):
            if (file.parent / "run" / "checkpoint-20").is_dir():
                return int(file.read_text())
        time.sleep(0.005)
    raise AssertionError(f"no run {name} began in {out}")


def long_keys(data, out, **changes):
    """Runs that last long enough to be stopped, with a checkpoint each 20 steps."""
    usual = {"methods": "lora rank=2", "rates": [1e-3], "max_steps": 160, "eval_steps": 20, "logging_steps": 100}
    return keys(data, out, pool=1, **usual | changes)


def test_a_killed_run_goes_on_from_its_checkpoint_and_the_others_are_kept(tmp_path):
    data, out, said = write_rows(tmp_path / "data"), tmp_path / "out", []

    def kill():
        os.kill(worker_of(out, "lora-rank=2-learning-rate-0.001-seed-1", 120.0), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    comparison = run_comparison(read_compare(long_keys(data, out, max_steps=60)), say=said.append)
    killer.join()
    assert [(run.seed, run.status, run.steps, run.test is not None) for run in comparison.runs] == [
        (0, "done", 60, True),
        (1, "done", 60, True),
    ]
    assert any("seed 1: killed: the run was killed by SIGKILL" in line and "tried again" in line for line in said)
    assert sum(line.startswith("started") and "seed 0" in line and "test" not in line for line in said) == 1
    (place,) = out.glob("runs/*seed-1-*")
    log = (place / "log.txt").read_text()
    step = re.search(r"resuming from .*checkpoint-(\d+)", log)[1]
    spent = json.loads((place / "seconds.json").read_text())
    assert 0 < spent[step] < spent["60"] < comparison.runs[1].seconds + 0.01  # what came before the kill counts too


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ctrl_c_keeps_what_is_finished(tmp_path):
    """One run is killed and tried again from its checkpoint; then the whole comparison is interrupted, and the next one goes on."""
    data, out = write_rows(tmp_path / "data"), tmp_path / "out"
    long = long_keys(data, out)
    recipe = tmp_path / "compare.json"  # JSON is YAML
    recipe.write_text(json.dumps(long))
    command = [sys.executable, "-m", "loratory", "compare", "--config", str(recipe)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    os.kill(worker_of(out, "lora-rank=2-learning-rate-0.001-seed-0"), signal.SIGKILL)
    worker_of(out, "lora-rank=2-learning-rate-0.001-seed-1", 120.0)  # the first went on to its end
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "killed by SIGKILL" in said
    assert "tried again" in said
    assert f"go on with: loratory compare --config {out / 'compare.yaml'}" in said
    assert "resuming from" in next(out.glob("runs/*seed-0-*/log.txt")).read_text()
    assert [run["status"] for run in Results(out).runs().values()] == ["done"]
    said = []
    from loratory.cli.train import read_yaml

    comparison = run_comparison(read_compare(read_yaml(str(out / "compare.yaml"))), say=said.append)
    assert not any("seed 0" in line and "on test" not in line for line in said if line.startswith("started"))
    assert "resuming from" in next(out.glob("runs/*seed-1-*/log.txt")).read_text()
    assert [(run.seed, run.status, run.test is not None) for run in comparison.runs] == [
        (0, "done", True),
        (1, "done", True),
    ]


# -- parts of it, without a run -------------------------------------------------------------------------------------------


def job_for(data, folder, kind="train"):
    """A job of the worker's, and its settings."""
    asked = {"method": "lora", "learning_rate": 1e-3, "output_dir": str(folder / "run"), "measure_test": False}
    shared = read_compare(keys(data, folder)).shared
    settings = read_settings(shared | asked)
    rows = fingerprint(read_splits(settings))
    job = Job(
        kind=kind, key="lora", title="lora", folder=str(folder), settings=shared | asked, fingerprint=rows, metric="token_loss"
    )  # fmt: skip
    return job, settings


def test_each_run_has_a_folder_of_its_own(tmp_path):
    one, *others = names = [f"{label} | learning rate 0.001 | seed 0" for label in ("lora", "lora+", "lora ü", "lora*")]
    assert len({place_of(tmp_path, name) for name in names}) == 4
    old = tmp_path / "lora-learning-rate-0.001-seed-0"  # folders had no digest once
    old.mkdir()
    (old / "train-job.json").write_text(json.dumps({"key": one}))
    assert place_of(tmp_path, one) == old
    assert old not in {place_of(tmp_path, name) for name in others}
    assert len(place_of(tmp_path, "lora | " * 99).name) < 120


def test_a_lost_adapter_is_not_measured_as_the_base(tmp_path):
    job, settings = job_for(write_rows(tmp_path / "data"), tmp_path / "job", "test")
    with pytest.raises(RuntimeError, match=r"the run's adapter is not in '.*job/run' any more; put the folder back"):
        worker.test_run(job, settings)


def test_a_score_that_is_no_number_is_told_as_diverged(tmp_path, monkeypatch):
    job, settings = job_for(write_rows(tmp_path / "data"), tmp_path / "job", "test")
    (tmp_path / "job" / "run" / "adapter").mkdir(parents=True)

    def measured(value, row):
        task = SimpleNamespace(measure=lambda *words, metric: ({metric: value, "tokens": 3.0}, [1.0, row]))
        monkeypatch.setattr(worker, "opened", lambda adapter, settings: (None, None, task))
        return worker.test_run(job, settings)

    assert measured(1.5, 2.0)["test_each"] == [1.0, 2.0]
    for value, row in ((math.nan, 2.0), (1.5, math.nan), (math.inf, math.inf)):
        assert measured(value, row) == {
            "status": "diverged",
            "error": "token_loss on test is nan or inf, or that of a row is",
        }
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": math.inf}]
    assert worker.curve(history, "loss") == [(1, 2.0)]


def test_a_run_that_diverged_on_test_is_told_and_not_measured_again(copy):
    from loratory.compare.choice import steps

    results = Results(copy[0])
    results.add_test("frozen | seed 1", {"status": "diverged", "error": "token_loss on test is nan"})
    comparison = read_comparison(copy[0])
    assert [run.test is None for run in comparison.runs if run.method == "frozen"] == [False, True]
    assert "frozen, seed 1 diverged on test: token_loss on test is nan" in comparison.warnings
    assert not list(steps(results.definition(), results.runs(), results.tests(), set()))


def test_a_method_that_was_left_out_is_tried_again_with_other_settings(tmp_path):
    data, results = write_rows(tmp_path / "data"), Results(tmp_path / "out")

    def arms(rank):
        table = {"small": {"method": "lora", "rank": 2}, "big": {"method": "lora", "rank": rank}}
        given = keys(data, tmp_path / "out", methods=table, budget="trained=40000")
        return define(read_compare(given), results, timed=None, say=lambda text: None, command="")

    first = arms(32)
    assert list(first["arms"]) == ["small"]
    assert "'big' cannot stay within trained=40000" in first["refused"]["big"]
    second = arms(3)
    assert (list(second["arms"]), second["refused"]) == (["small", "big"], {})
    assert second["arms"]["small"] == first["arms"]["small"]


def test_a_method_that_cannot_be_timed_is_left_out_and_the_others_stay(tmp_path):
    data = write_rows(tmp_path / "data")

    def fitted(methods, out, lost):
        def timed(arm, given, rows):
            if arm.label in lost:
                raise NotTimed(arm, "killed by SIGKILL")
            return 0.5

        given = keys(data, tmp_path / out, methods=methods, budget="seconds=3")
        return define(read_compare(given), Results(tmp_path / out), timed=timed, say=lambda text: None, command="")

    found = fitted("lora,dora", "out", {"dora"})
    assert found["arms"]["lora"]["changes"] == {"max_steps": 6}
    assert found["refused"] == {"dora": "'dora' could not be timed: killed by SIGKILL"}
    assert list(fitted("lora,dora", "out", set())["arms"]) == ["lora", "dora"]  # the next call tries it again
    with pytest.raises(
        ValueError, match="budget seconds=3 gives no method its steps; 'lora' could not be timed: killed"
    ):
        fitted("lora", "none", {"lora"})


def test_timing_is_tried_again_as_often_as_runs_are(tmp_path):
    settings = read_compare(keys(write_rows(tmp_path / "data"), tmp_path / "out", methods="lora", retries=1))
    lost, done = {"status": "killed", "error": "by SIGKILL"}, {"status": "done", "error": None, "step_seconds": 0.25}

    def timed(*answers):
        left = list(answers)
        pool = SimpleNamespace(start=lambda job: None, next=lambda: (None, left.pop(0)))
        work = Work(tmp_path / "out", settings, Results(tmp_path / "out"), pool, print)
        return work.seconds_of_a_step(settings.arms()[0], {}, "")

    assert timed(lost, done) == 0.25
    with pytest.raises(NotTimed, match="'lora' could not be timed: by SIGKILL"):
        timed(lost, lost, done)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked")
def test_ctrl_c_reaches_workers_that_begin_only_then_and_those_that_have_ended():
    """The nursery still imports when Ctrl-C comes: no worker is known. Another one has ended, and nobody has read it yet."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # in the background of a shell it is ignored
    late = subprocess.Popen(["sleep", "60"], preexec_fn=heard)

    def ended(patience):
        if "late" not in nursery.pids:
            nursery.pids["late"] = late.pid
            return {}
        return {"gone": 0, "late": late.wait(10)}

    nursery = SimpleNamespace(pids={"gone": gone.pid}, ended=ended, close=lambda: None)
    pool = LocalPool(2, 1)
    pool.nursery, pool.jobs = nursery, {"gone": None, "late": None}
    try:
        pool.stop()
        assert late.returncode == -signal.SIGINT
    finally:
        late.kill()


@pytest.mark.parametrize("damage", [lambda whole: whole[:5000], lambda whole: whole[:4096] + b"?" * len(whole[4096:])])
def test_a_damaged_results_file_has_one_clear_message(copy, capsys, damage):
    file = copy[0] / FILE
    file.write_bytes(damage(file.read_bytes()))
    assert main(["compare", str(copy[0])]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(
        rf"error: '{re.escape(str(file))}' could not be read or written \(.*\); free disk space, .*\n", said
    )


# -- settings and budgets -----------------------------------------------------------------------------------


def test_budget_of_trained_numbers_solves_ranks(tmp_path):
    from loratory.compare.budget import OverBudget, fit_arm, read_budget, trained_numbers
    from loratory.compare.settings import run_keys
    from loratory.train.settings import read_settings

    data = write_rows(tmp_path / "data")
    settings = read_compare(keys(data, tmp_path / "out", methods="lora,dora,peft:vera,full"))
    limit = read_budget("trained=40000")
    for arm in settings.arms():
        asked = run_keys(settings, arm)
        if arm.label == "full":
            with pytest.raises(
                OverBudget, match="'full' cannot stay within trained=40000: it has no rank to lower, and it needs 2"
            ):
                fit_arm(arm, asked, limit)
            continue
        fitted = fit_arm(arm, asked, limit)
        (name, rank), *_ = fitted.changes.items()
        assert trained_numbers(read_settings({**asked, name: rank})) == fitted.used <= 40000
        assert trained_numbers(read_settings({**asked, name: rank + 1})) > 40000


def test_a_budget_that_no_method_can_meet_names_the_closest(tmp_path):
    data = write_rows(tmp_path / "data")
    settings = read_compare(keys(data, tmp_path / "out", methods="full,lora", budget="trained=100"))
    with pytest.raises(
        ValueError, match="budget trained=100 can be met by no method; the closest is 'lora' with 5,780 numbers"
    ):
        run_comparison(settings, say=lambda text: None)


def test_a_wrong_setting_under_a_budget_is_told_as_it_is(tmp_path):
    data = write_rows(tmp_path / "data")
    settings = read_compare(keys(data, tmp_path / "out", methods="lora", budget="trained=40000", where="nowhere"))
    with pytest.raises(ValueError, match="nowhere"):
        run_comparison(settings, say=lambda text: None)


def test_memory_budget_keeps_the_rows_of_a_step(tmp_path):
    from loratory.compare.budget import OverBudget, fit_arm, read_budget
    from loratory.compare.settings import run_keys
    from loratory.train.planned import plan

    data = write_rows(tmp_path / "data")
    settings = read_compare(keys(data, tmp_path / "out", methods="lora", per_device_train_batch_size=8))
    arm = settings.arms()[0]
    asked = run_keys(settings, arm)
    whole = plan(asked).peak
    fitted = fit_arm(arm, asked, read_budget(f"memory={int(whole * 0.6)}"))
    batch, times = fitted.changes["per_device_train_batch_size"], fitted.changes["gradient_accumulation_steps"]
    assert batch < 8
    assert batch * times == 8
    assert fitted.used <= whole * 0.6
    with pytest.raises(OverBudget, match="with one row at a time it still needs"):
        fit_arm(arm, asked, read_budget("memory=100KB"))


def test_adapter_bytes_are_those_of_the_file_that_is_written(tmp_path):
    from loratory.compare.budget import OverBudget, fit_arm, read_budget
    from loratory.compare.settings import run_keys

    data = write_rows(tmp_path / "data")
    settings = read_compare(keys(data, tmp_path / "out", methods="lora,peft:vera"))
    for arm in settings.arms():
        fitted = fit_arm(arm, run_keys(settings, arm), read_budget("adapter_bytes=60KB"))
        assert 30_000 < fitted.used <= 60_000
        with pytest.raises(OverBudget, match=r"it still needs .* bytes of adapter"):
            fit_arm(arm, run_keys(settings, arm), read_budget("adapter_bytes=100"))
    comparison = run_comparison(
        read_compare(keys(data, tmp_path / "out", methods="lora", budget="adapter_bytes=60KB", rates=[1e-3], seeds=1)),
        say=lambda text: None,
    )
    (run,) = comparison.runs
    fitted = fit_arm(settings.arms()[0], run_keys(settings, settings.arms()[0]), read_budget("adapter_bytes=60KB"))
    assert run.adapter_bytes == fitted.used


@pytest.mark.slow
def test_a_budget_of_seconds_gives_the_faster_method_more_steps_and_a_second_call_keeps_them(tmp_path):
    data, said = write_rows(tmp_path / "data"), []
    given = keys(data, tmp_path / "out", methods="lora rank=2,full", budget="seconds=3", rates=[1e-3], seeds=1, pool=1)
    comparison = run_comparison(read_compare(given), say=said.append)
    steps = {run.method: run.steps for run in comparison.runs}
    assert all(count >= 1 for count in steps.values())
    for run in comparison.runs:
        assert run.seconds == pytest.approx(3, abs=2.5), said
    again = run_comparison(read_compare(given), say=lambda text: None)
    assert {run.method: run.steps for run in again.runs} == steps


@pytest.mark.slow
def test_a_grid_whose_best_is_at_its_edge_is_extended_when_asked(tmp_path):
    data, said = write_rows(tmp_path / "data"), []
    given = keys(data, tmp_path / "out", methods="lora rank=2", rates=[1e-7, 1e-6], seeds=1)
    comparison = run_comparison(read_compare(given), say=said.append)
    assert any("lora rank=2 1e-06 (the largest; next 1e-05)" in warning for warning in comparison.warnings)
    wider = run_comparison(read_compare(given | {"extend_grid": True}), say=said.append)
    assert any("1e-06 is at the edge of its grid, so 1e-05 is tried too" in line for line in said)
    assert {run.learning_rate for run in wider.runs} > {1e-7, 1e-6, 1e-5}
    assert wider.chosen["lora rank=2"] > 1e-6
    kept = {(run.learning_rate, run.seed): run.dev for run in comparison.runs}
    assert all(kept[key] == run.dev for run in wider.runs if (key := (run.learning_rate, run.seed)) in kept)


@pytest.mark.slow
def test_bleu_is_measured_on_test_and_rates_are_chosen_by_the_loss_on_dev(tmp_path):
    data = write_rows(tmp_path / "data")
    given = keys(data, tmp_path / "out", methods="lora rank=2", rates=[1e-3, 1e-2, 1e-1], seeds=1, metric="bleu")
    comparison = run_comparison(read_compare(given), say=lambda text: None)
    assert (comparison.metric, comparison.greater_is_better) == ("bleu", True)
    assert "learning rates were chosen by token_loss on dev, not by bleu" in comparison.warnings
    tested = [run for run in comparison.runs if run.test is not None]
    assert [run.learning_rate for run in tested] == [comparison.chosen["lora rank=2"]]
    assert 0 <= tested[0].test["bleu"] <= 100
    assert len(tested[0].test_each) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "lorra"}, "'lorra' is no method; nearest names: .*lora"),
        ({"methods": "lora,lora"}, "names 'lora' twice"),
        ({"methods": ""}, "methods is empty"),
        ({"methods": "lora 16"}, "'16' in 'lora 16' is no setting; write key=value"),
        ({"baseline": "dora"}, "baseline is 'dora', which is not among the methods"),
        ({"seeds": 0}, "seeds is 0; it must be a count of at least 1"),
        ({"seeds": [1, 1]}, "a list of different numbers"),
        ({"search_seeds": 3}, "search_seeds is 3, but there are 2 seeds"),
        ({"rates": [0.0]}, "at least one learning rate above 0"),
        (
            {"methods": {"lora": {"rates": "many"}}},
            "rates of 'lora' are 'many'; give at least one learning rate above 0",
        ),
        ({"methods": {"lora": {"rates": [1e-3, None]}}}, "rates of 'lora' are .*None"),
        ({"methods": {"lora": {"rates": []}}}, "rates of 'lora' are"),
        ({"budget": "flops=3"}, "it must be kind=amount with one of steps, trained, memory"),
        ({"budget": "steps=0"}, "it must be a number above 0"),
        ({"learning_rate": 1e-3}, "'learning_rate' cannot be set, .* use rates"),
        ({"preset": "nothing"}, "there is no preset 'nothing'"),
        ({"max_stepps": 3}, "there is no setting 'max_stepps'; nearest names: max_steps"),
    ],
)
def test_mistakes_have_one_clear_message(tmp_path, changes, message):
    given = keys(tmp_path, tmp_path / "out", methods="lora") | changes
    with pytest.raises(ValueError, match=message):
        read_compare(given)


def test_one_rate_needs_no_list(tmp_path):
    given = keys(tmp_path, tmp_path / "out", methods={"lora": {"rates": 0.001}, "dora": {"rates": "1e-3"}})
    assert [arm.rates for arm in read_compare(given).arms()] == [(0.001,), (0.001,)]


def test_data_without_dev_or_test_is_refused(tmp_path):
    data = write_rows(tmp_path / "data")
    for split in ("dev", "test"):
        (data / f"{split}.jsonl").rename(tmp_path / "aside")
        with pytest.raises(ValueError, match=f"has no {split} rows"):
            run_comparison(read_compare(keys(data, tmp_path / split)), say=print)
        (tmp_path / "aside").rename(data / f"{split}.jsonl")


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    data = write_rows(tmp_path / "data")
    with pytest.raises(FileExistsError, match="holds other things than a comparison"):
        lt.compare(say=print, **keys(data, data))


@pytest.mark.parametrize("name", presets())
def test_presets_fix_at_least_three_rates_for_each_method(name):
    settings = read_compare({"preset": name})
    assert all(len(arm.rates) >= 3 for arm in settings.arms())
    assert len(settings.all_seeds()) == 3
    assert settings.search_seeds == 1


def test_grids_grow_beyond_an_edge():
    from loratory.compare.choice import beyond, choose, extend, key_of

    definition = {
        "arms": {"lora": {"rates": [1e-3, 1e-2], "extended": 0}}, "seeds": [0], "search_seeds": 1, "dev_metric": "accuracy", "dev_greater": True,
    }  # fmt: skip
    runs = {
        key_of("lora", rate, 0): {"status": "done", "dev": {"accuracy": score}}
        for rate, score in ((1e-3, 0.5), (1e-2, 0.7))
    }
    assert choose(definition, "lora", runs) == 1e-2
    assert beyond([1e-3, 1e-2], 1e-2) == 0.1
    assert extend(definition, runs) == ["lora: the best rate 0.01 is at the edge of its grid, so 0.1 is tried too"]
    runs[key_of("lora", 0.1, 0)] = {"status": "diverged", "dev": {}}
    assert choose(definition, "lora", runs) == 1e-2
    assert extend(definition, runs) == []
    runs[key_of("lora", 1e-3, 0)] = {"status": "done", "dev": {"accuracy": 0.8}}
    assert extend(definition, runs) == ["lora: the best rate 0.001 is at the edge of its grid, so 0.0001 is tried too"]
    definition["arms"]["lora"]["rates"].remove(1e-4)
    assert definition["arms"]["lora"]["rates"] == [1e-3, 1e-2, 0.1]


def test_ray_gives_the_same_results(finished, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    out, data, _ = finished
    settings = read_compare(keys(data, tmp_path / "ray", engine="ray", methods="lora rank=2"))
    other = run_comparison(settings, say=lambda text: None)
    here = {(run.learning_rate, run.seed): run for run in read_comparison(out).runs if run.method == "lora rank=2"}
    assert len(other.runs) == len(here)
    for run in other.runs:
        same = here[run.learning_rate, run.seed]
        assert (run.status, run.dev, run.test, run.test_each) == (same.status, same.dev, same.test, same.test_each)
        assert [value for _, value in run.loss_curve] == [value for _, value in same.loss_curve]
