"""Runs from settings to adapter, and what stops them."""

import errno
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import loratory as lt
from loratory.store import atomic
from loratory.train import callbacks, read_settings, train
from loratory.train import checkpoint as ckpt
from loratory.train.opened import open_adapter
from loratory.train.trainer import LoraTrainer

Keys = Callable[..., dict[str, Any]]

# every evaluation is worse than the one before, because a falling loss is called worse
WORSE: dict[str, Any] = {"learning_rate": 3e-3, "warmup_steps": 0, "eval_steps": 1, "greater_is_better": True}


def lines_of(run: Callable[..., Any], **keys: Any) -> tuple[Any, str]:
    said: list[str] = []
    return run(**keys, say=said.append), "\n".join(said)


def test_a_run_trains_measures_saves_and_reopens(keys: Keys, data: Path) -> None:
    result, said = lines_of(
        train,
        **keys(eval_before=True, test=str(data / "test.jsonl"), max_new_tokens=4, learning_rate=5e-3, max_steps=8),
    )
    output = Path(result.output_dir)
    assert result.stopped == "done"
    assert result.steps == 8
    assert result.trained == 4480
    assert result.after["token_loss"] < result.before["token_loss"]
    assert {"bleu", "chrf", "token_loss"} <= set(result.test_after)
    assert "[[It is there." in said  # the first example with its loss mask
    assert "13 rows, 13 examples, 0 truncated" in said
    assert "tokens/s" in said
    assert "trained 4,480 of" in said
    names = {path.name for path in output.iterdir()}
    assert names == {
        "adapter",
        "before.json",
        "checkpoint-6",
        "checkpoint-8",
        "metrics.jsonl",
        "result.json",
        "settings.yaml",
    }
    record = lt.inspect(output).training
    assert record["settings"]["rank"] == 2
    assert record["task"]["prompt_column"] == "prompt"
    assert set(record["versions"]) == {"python", "loratory", "torch", "transformers", "accelerate"}
    assert record["data"]["train"]["rows"] == 13
    assert record["result"]["after"] == result.after
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert lines[0]["step"] == 0
    opened = open_adapter(output)
    rows = [
        {"prompt": "test place 0, area 0", "completion": "It is there. "},
        {"prompt": "test place 1, area 1", "completion": "It is there. Yes. "},
    ]
    assert opened.task is not None
    again = opened.task.evaluate(opened.model, opened.tokenizer, rows)
    assert again["token_loss"] == pytest.approx(result.test_after["token_loss"], rel=1e-6)


def test_the_best_checkpoint_is_kept_and_taken(keys: Keys) -> None:
    result, said = lines_of(train, **keys(**WORSE, save_total_limit=1, max_steps=3))
    output, best = Path(result.output_dir), result.best_step
    assert best == 1
    assert f"taking the best checkpoint: step {best}" in said
    assert [path.name for path in ckpt.checkpoints(output)] == ["checkpoint-1", "checkpoint-3"]
    taken, kept = (lt.store.native.read(folder)[1] for folder in (output / "adapter", output / "checkpoint-1"))
    assert all(torch.equal(taken[name], kept[name]) for name in kept)


def test_full_and_frozen_and_head(keys: Keys, tmp_path: Path) -> None:
    frozen, said = lines_of(
        train, **keys(method="frozen", rank=None, eval_before=True, output_dir=str(tmp_path / "frozen"))
    )
    assert frozen.adapter is None
    assert frozen.before == frozen.after
    assert "trains nothing, so this run only measures" in said
    full, _ = lines_of(train, **keys(method="full", rank=None, max_steps=2, output_dir=str(tmp_path / "full")))
    assert full.trained == full.total


def test_classification_trains_its_new_head(keys: Keys, tmp_path: Path) -> None:
    rows = [{"text": f"{'good' if i % 2 else 'bad'} thing {i}", "label": "yes" if i % 2 else "no"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result, said = lines_of(
        train, **keys(task="classification", train=str(tmp_path / "rows.jsonl"), dev=None, max_steps=2)
    )
    assert "the head score is this task's own" in said
    assert "1 of 12 training rows held out" in said
    assert "accuracy" in result.after
    assert "score.weight" in lt.inspect(result.adapter).also_train
    assert open_adapter(result.adapter).model.config.num_labels == 2


def test_accumulated_batches_weigh_as_one(keys: Keys, tmp_path: Path) -> None:
    rows = [{"text": f"{'good' if i % 2 else 'bad'} thing {i}", "label": "yes" if i % 2 else "no"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses, weights = [], []
    for name, size, together in (("whole", 4, 1), ("halves", 2, 2)):
        result = train(
            **keys(
                task="classification", train=str(tmp_path / "rows.jsonl"), dev=str(tmp_path / "rows.jsonl"), max_steps=2,
                per_device_train_batch_size=size, gradient_accumulation_steps=together, optim="sgd", learning_rate="1e-1",
                max_grad_norm=0.0, output_dir=str(tmp_path / name),
            ),
            say=str,
        )  # fmt: skip
        losses.append([entry["loss"] for entry in result.history if "loss" in entry])
        weights.append(lt.store.native.read(Path(result.adapter))[1]["also_train/score.weight"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


def test_dry_run_writes_nothing(keys: Keys) -> None:
    result, said = lines_of(train, **keys(dry_run=True))
    assert result.stopped == "dry run"
    assert "dry run: 4 batches an epoch on cpu" in said
    assert not Path(result.output_dir).exists()


def test_output_folder_in_use(keys: Keys) -> None:
    output = Path(keys()["output_dir"])
    train(**keys(max_steps=1), say=str)
    with pytest.raises(
        FileExistsError, match=r"is not empty .*--resume, empty it with --overwrite, or name another --output_dir"
    ):
        train(**keys(max_steps=1), say=str)
    train(**keys(max_steps=1, overwrite=True), say=str)
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds thesis.txt, which no run wrote, so it is not emptied"):
        train(**keys(max_steps=1, overwrite=True), say=str)
    assert (output / "thesis.txt").read_text() == "mine"


def test_resume_of_nothing_and_of_another_run(keys: Keys, data: Path) -> None:
    _, said = lines_of(train, **keys(resume=True))
    assert "there is no checkpoint in" in said
    assert "starts from step 0" in said
    with pytest.raises(
        ValueError, match=r"made by another run: learning_rate was 0.0002, now 0.1; rank was 2, now 3; resume with"
    ):
        train(**keys(resume=True, rank=3, learning_rate=0.1), say=str)
    finished, said = lines_of(train, **keys(resume=True, logging_steps=7))  # changes nothing that matters
    assert finished.steps == 4
    (data / "train.jsonl").write_text((data / "train.jsonl").read_text().replace("place 3", "place 9"))
    with pytest.raises(ValueError, match=r"the train rows are others \(13 then, 13 now\)"):
        train(**keys(resume=True), say=str)


def test_foreign_and_damaged_checkpoints_are_refused(keys: Keys) -> None:
    result = train(**keys(), say=str)
    newest = ckpt.checkpoints(result.output_dir)[-1]
    (newest / "adapter.safetensors").write_bytes((newest / "adapter.safetensors").read_bytes()[:-1])
    with pytest.raises(
        ValueError,
        match=r"adapter.safetensors has .* bytes instead of .*delete the folder to go on from the checkpoint before",
    ):
        train(**keys(resume=True), say=str)
    foreign = Path(result.output_dir) / "checkpoint-99"
    foreign.mkdir()
    torch.save({}, foreign / "optimizer.pt")
    with pytest.raises(
        ValueError, match=r"optimizer.pt, a pickle: it can run any code when it is read, so it is refused"
    ):
        train(**keys(resume=True), say=str)


def test_time_limit_saves_and_goes_on(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(**keys(output_dir=keys()["output_dir"] + "-whole"), say=str)
    real = callbacks.time.monotonic
    monkeypatch.setattr(
        callbacks.time, "monotonic", lambda: real() + 10_000 * len(ckpt.checkpoints(keys()["output_dir"]))
    )
    result, said = lines_of(train, **keys(max_minutes=60))
    monkeypatch.undo()
    assert (result.stopped, result.steps) == ("time", 3)  # the first checkpoint stands at step 2
    assert f"go on with: loratory train --config {result.output_dir}/settings.yaml --resume" in said
    assert (Path(result.output_dir) / "adapter").is_dir()
    ended = train(**keys(max_minutes=60, resume=True), say=str)
    assert (ended.stopped, ended.steps) == ("done", 4)
    assert ended.after["token_loss"] == whole.after["token_loss"]


def test_first_interrupt_saves_second_kills(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    step = LoraTrainer.training_step

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "training_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    result, said = lines_of(train, **keys())
    assert signal.getsignal(signal.SIGINT) is before
    assert (result.stopped, result.steps, result.adapter) == ("interrupted", 2, None)
    assert "Ctrl-C: finishing this step and saving" in said
    assert "go on with: loratory train --config" in said
    assert [path.name for path in ckpt.checkpoints(result.output_dir)] == ["checkpoint-2"]

    def twice(self: Any, *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "training_step", twice)
    with pytest.raises(KeyboardInterrupt):
        train(**keys(resume=True), say=str)
    monkeypatch.undo()
    assert train(**keys(resume=True), say=str).steps == 4


def test_nan_stops_with_step_rows_and_checkpoint(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = LoraTrainer.compute_loss

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.model.training and self.state.global_step == 3 else loss

    monkeypatch.setattr(LoraTrainer, "compute_loss", broken)
    with pytest.raises(FloatingPointError) as caught:
        train(**keys(), say=str)
    message = str(caught.value)
    assert "the loss is nan at step 4 (training rows: " in message
    assert message.count("train.jsonl row ") in (1, 4)
    assert f"the last good checkpoint is {keys()['output_dir']}/checkpoint-2; lower learning_rate" in message


def test_infinite_gradient_stops_naming_the_tensor(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    step = LoraTrainer.training_step

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, *args, **kwargs)
        next(iter(lt.trained(self.model).values())).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(LoraTrainer, "training_step", broken)
    with pytest.raises(
        FloatingPointError, match=r"the gradient of '.*' is nan or inf at step 1 .*there is no checkpoint yet"
    ):
        train(**keys(), say=str)


def test_disk_full_while_saving_loses_nothing(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(**keys(output_dir=keys()["output_dir"] + "-whole"), say=str)
    write, calls = ckpt.write_state, []

    def full(folder: Path, **kwargs: Any) -> None:
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, **kwargs)

    monkeypatch.setattr(ckpt, "write_state", full)
    with pytest.raises(
        OSError,
        match=r"the disk is full, so checkpoint-4 could not be written; nothing is lost up to .*checkpoint-2; free",
    ) as caught:
        train(**keys(), say=str)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert {path.name for path in Path(keys()["output_dir"]).iterdir()} == {
        "checkpoint-2",
        "metrics.jsonl",
        "settings.yaml",
    }
    assert train(**keys(resume=True), say=str).after["token_loss"] == whole.after["token_loss"]


def test_disk_full_at_the_final_adapter(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    write = atomic.write_files

    def full(folder: Any, files: Any) -> None:
        if Path(folder).name == "adapter":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, files)

    monkeypatch.setattr(atomic, "write_files", full)
    with pytest.raises(
        OSError, match=r"the disk is full, so adapter could not be written; nothing is lost up to .*checkpoint-4"
    ):
        train(**keys(), say=str)
    monkeypatch.undo()
    assert Path(train(**keys(resume=True), say=str).adapter).is_dir()


def test_out_of_memory_says_what_to_change(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(LoraTrainer, "training_step", greedy)
    with pytest.raises(
        MemoryError,
        match=r"try, in this order: per_device_train_batch_size 2 with gradient_accumulation_steps 2 .*gradient_checkpointing",
    ):
        train(**keys(), say=str)


def test_early_stopping(keys: Keys) -> None:
    result = train(**keys(**WORSE, early_stopping_patience=2, max_steps=10), say=str)
    assert (result.stopped, result.steps, result.best_step) == ("early stopping", 3, 1)
    again = train(**keys(**WORSE, early_stopping_patience=2, max_steps=10, resume=True), say=str)
    assert (again.stopped, again.steps, again.after) == ("early stopping", 3, result.after)


def test_measuring_does_not_change_what_is_trained(keys: Keys, tmp_path: Path) -> None:
    results = [
        train(
            **keys(
                dropout=0.3, eval_steps=every, load_best_model_at_end=False, output_dir=str(tmp_path / f"out{every}")
            ),
            say=str,
        )
        for every in (1, 4)
    ]
    first, second = (lt.store.native.read(Path(result.adapter))[1] for result in results)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("option", ["gradient_checkpointing", "optimizer", "scheduler", "epochs", "bias"])
def test_training_options_reach_the_trainer(keys: Keys, option: str) -> None:
    changes: dict[str, Any] = {
        "gradient_checkpointing": {"gradient_checkpointing": True},
        "optimizer": {"optim": "adafactor"},
        "scheduler": {"lr_scheduler_type": "cosine", "adam_beta2": 0.9, "weight_decay": 0.1},
        "epochs": {"max_steps": None, "num_train_epochs": 1, "eval_steps": None},
        "bias": {"rank_pattern": {"q_proj": 1}, "also_train": ["model.norm"]},
    }[option]
    assert train(**keys(**changes), say=str).steps == 4


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"disable_tqdm": True}, ValueError, "'disable_tqdm' cannot be set"),
        ({"optim": "galore_adamw", "optim_target_modules": "q_proj"}, (ValueError, ImportError), "optim|galore"),
        (
            {"lr_scheduler_type": "linaer"},
            ValueError,
            "the training settings are refused: linaer is not a valid SchedulerType",
        ),
        ({"device": "cuda"}, (ValueError, RuntimeError), "cuda"),
        ({"prompt_column": "ask"}, ValueError, "column 'ask' is missing"),
        ({"train": "nowhere.jsonl"}, FileNotFoundError, "nowhere.jsonl"),
        ({"base": "./nowhere"}, FileNotFoundError, "base './nowhere' was not found"),
        ({"rank": 500}, ValueError, "rank 500 is too large"),
        ({"where": ["q_prj"]}, ValueError, "no layer of the model is called; nearest names: q_proj"),
        ({"alpha": 0.0}, ValueError, "alpha is 0.0; it must be a positive"),
        (
            {"metric_for_best_model": "blue"},
            ValueError,
            r"metric_for_best_model is 'blue', but an evaluation measures token_loss, perplexity",
        ),
        ({"max_length": 4}, ValueError, "there is nothing to learn; raise max_length"),
    ],
)
def test_mistakes_of_a_new_user(keys: Keys, changes: dict[str, Any], error: Any, message: str) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        changes = {"device": "cuda:99"}
    with pytest.raises(error, match=message):
        train(**keys(**changes), say=str)


def test_train_takes_settings_or_keywords(keys: Keys) -> None:
    assert train(read_settings(keys(max_steps=1)), say=str).steps == 1
    with pytest.raises(TypeError, match=r"either one TrainSettings object or settings as keywords"):
        train()


def test_the_plain_base_loads_beside_the_adapter(keys: Keys) -> None:
    result = train(**keys(), say=str)
    model = AutoModelForCausalLM.from_pretrained(keys()["base"])
    lt.load(model, result.output_dir)
    assert lt.active(model) == ("default",)


def test_a_method_that_starts_from_data_collects_it_once(
    keys: Keys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from loratory.train import start

    chosen = {"method": "lora-sb", "rank": 3, "samples": 7, "learning_rate": 1e-2, "warmup_steps": 2}
    whole, said = lines_of(train, **keys(**chosen))
    assert said.count("LoRASB starts from the gradient of 7 training rows (of 13, chosen by the seed)") == 1
    record = lt.inspect(tmp_path / "out")
    assert record.hyperparameters["first_step"] == pytest.approx(1e-2 / 2)
    part = tmp_path / "part"
    cut = keys(**chosen, output_dir=str(part), max_minutes=1e-9)
    lines_of(train, **cut)
    monkeypatch.setattr(start.lt, "collect", None)  # the checkpoint holds the start
    resumed, _ = lines_of(train, **({k: v for k, v in cut.items() if k != "max_minutes"} | {"resume": True}))
    assert resumed.steps == whole.steps == 4
    one, other = ((folder / "adapter" / "adapter.safetensors").read_bytes() for folder in (tmp_path / "out", part))
    assert one == other


@pytest.mark.parametrize(
    ("chosen", "batch"),
    [
        (
            {"method": "loca", "n_frequency": 20, "location_steps": 13, "max_steps": 14, "eval_steps": 7, "rank": None},
            2,
        ),
        ({"method": "snella", "rank": 4, "target": 0.8, "max_steps": 5, "eval_steps": 5}, 4),  # an epoch is a step
    ],
    ids=lambda v: v["method"] if isinstance(v, dict) else "",
)
def test_a_method_that_acts_during_training_is_driven_and_resumed(
    keys: Keys, tmp_path: Path, chosen: dict, batch: int
) -> None:
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": batch}
    whole, _ = lines_of(train, **keys(**chosen, **sizes))
    assert whole.steps == chosen["max_steps"]
    part = tmp_path / "part"
    cut = keys(**chosen, **sizes, output_dir=str(part))
    lines_of(train, **cut, max_minutes=1e-9)
    assert ckpt.read_state(part / "checkpoint-1")[0]["drive"]["default"]["step"] == 1
    resumed, _ = lines_of(train, **cut, resume=True)
    assert resumed.steps == chosen["max_steps"]
    one, other = ((folder / "adapter" / "adapter.safetensors").read_bytes() for folder in (tmp_path / "out", part))
    assert one == other


# -- packing and memory ------------------------------------------------------------------------------------------------


def losses_of(keys: Keys, **changes: Any) -> list[float]:
    result, _ = lines_of(
        train, **keys(learning_rate=5e-3, max_steps=4, logging_steps=1, eval_before=False, overwrite=True, **changes)
    )
    return [line[key] for line in result.history for key in ("loss", "grad_norm", "eval_token_loss") if key in line]


def test_packed_rows_and_every_memory_setting_train_the_same(keys: Keys) -> None:
    plain = losses_of(keys, memory="fast")
    assert len(plain) > 8
    for changes in ({"packing": True}, {"memory": "balanced"}, {"memory": "lean"}, {"packing": True, "memory": "lean"}):
        assert losses_of(keys, **changes) == pytest.approx(plain, rel=2e-4), changes


def test_less_memory_is_planned_for_less_memory(keys: Keys) -> None:
    peaks = [
        lt.plan(keys(memory=how, max_length=512, per_device_train_batch_size=8)).peak
        for how in ("fast", "balanced", "lean")
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[2] < 0.8 * peaks[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "prompt-tuning", "rank": None, "where": None},
            "prompt-tuning puts its tokens before the row's first alone; leave it out",
        ),
        (
            {"task": "classification", "text_column": "prompt", "label_column": "completion"},
            "task 'classification' has an answer for each row",
        ),
    ],
)
def test_packing_is_refused_where_a_row_must_be_one_example(keys: Keys, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(**keys(packing=True, **changes))


HOLES = """
import sys, torch
from loratory.train.callbacks import GiveBack

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) // 1024

give = GiveBack()
before = resident()
blocks, small = zip(*((torch.ones(1 << 20), torch.ones(1 << 14)) for _ in range(64)))  # a small one behind each
del blocks
held = resident()
getattr(give, sys.argv[1])(None, None, None)
print(held - before, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_optimizer_step"])
def test_lean_memory_leaves_no_holes(event: str) -> None:
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}  # as high as glibc's own gets
    done = subprocess.run([sys.executable, "-c", HOLES, event], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    held, left = map(int, done.stdout.split())
    assert left < 32 < 128 < held  # MiB of 256


def test_lean_memory_gives_freed_tensors_back(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr("loratory.train.callbacks.GiveBack.on_step_begin", lambda *args, **kwargs: given.append("step"))
    for how in ("balanced", "lean"):
        losses_of(keys, memory=how)
    assert len(given) == 4


def test_lean_memory_without_recomputation_is_a_contradiction(keys: Keys) -> None:
    with pytest.raises(ValueError, match="memory lean recomputes activations, and gradient_checkpointing is false"):
        read_settings(keys(memory="lean", gradient_checkpointing=False))


def test_a_schedule_that_freezes_columns_goes_on_to_the_same_bits(keys: Keys, tmp_path: Path) -> None:
    chosen = {"method": "lamda", "rank": 3, "candidates": "2,4", "eta": 0.7, "weight_decay": 0.1, "max_steps": 6}
    whole, _ = lines_of(train, **keys(**chosen))
    cut = keys(**chosen, output_dir=str(tmp_path / "part"), max_minutes=1e-9)
    stopped, _ = lines_of(train, **cut)
    assert stopped.steps < whole.steps == 6
    resumed, _ = lines_of(train, **({k: v for k, v in cut.items() if k != "max_minutes"} | {"resume": True}))
    assert resumed.steps == 6
    one, other = ((tmp_path / folder / "adapter" / "adapter.safetensors").read_bytes() for folder in ("out", "part"))
    assert one == other
    ranks = [over["rank"] for over in lt.inspect(tmp_path / "out").layers.values()]
    assert ranks.count(2) == ranks.count(4) == len(ranks) / 2
