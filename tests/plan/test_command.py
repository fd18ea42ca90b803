"""`loratory plan`, `fit`, and what a run says of its plan."""

import json
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import loratory as lt
from loratory.cli import main
from loratory.cli.train import read_keys
from loratory.train.fit import fit
from loratory.train.planned import planned_settings
from loratory.train.result import Result
from loratory.train.settings import read_settings
from tests.plan.test_memory import keys_of

STORIES = str(Path(__file__).parents[1] / "models" / "stories260k")
SHORT = ["--base", STORIES, "--max_length", "32", "--rank", "2", "--per_device_train_batch_size", "2"]


def test_table_and_card(capsys):
    assert main(["plan", *SHORT, "--card", "64MiB"]) == 0
    shown = capsys.readouterr().out
    plan = lt.plan({"base": STORIES, "max_length": 32, "rank": 2, "per_device_train_batch_size": 2})
    assert str(plan).splitlines()[0] in shown
    assert "in the backward pass" in shown
    assert "fits 64MiB (64 MiB usable)" in shown
    assert f"largest batch {plan.largest_batch(64 * 2**20)}" in shown


def test_json(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text(f"base: {STORIES}\nmax_length: 32\nmethod: dora\n")
    assert main(["plan", "--config", str(tmp_path / "run.yaml"), "--devices", "2", "--json", "--card=1MB"]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = lt.plan({"base": STORIES, "max_length": 32, "method": "dora"}, devices=2, sharding="ddp")
    assert (found["peak"], found["parts"], found["adapter_bytes"]) == (plan.peak, plan.parts, plan.adapter_bytes)
    assert (found["sharding"], found["fits"], found["settings"]["method"]) == ("ddp", False, "dora")
    assert "train" not in found["settings"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--card", "RTX 4099"], "card 'RTX 4099' is not known; nearest names: RTX 4090"),
        (["--optim", "adamw_9bit"], "optim is 'adamw_9bit', whose memory is not known; nearest names: adamw_8bit"),
        (["--methd", "lora"], "there is no setting 'methd'; nearest names: method"),
        (["--devices", "two"], "devices is 'two'; it must be a whole number"),
    ],
)
def test_mistakes_are_said(words, error, capsys):
    assert main(["plan", *SHORT, *words]) == 2
    assert f"error: {error}" in capsys.readouterr().err


def test_a_budget_that_nothing_meets_names_the_closest(tmp_path):
    keys = keys_of(
        "llama", {"per_device_train_batch_size": 1, "quantize": "nf4", "gradient_checkpointing": True}, tmp_path
    )
    plan = lt.plan(keys, dtype="bfloat16")
    closest = max(plan.peak, plan.startup_peak)
    with pytest.raises(ValueError, match=r"nothing fits 100KB \(98 KiB usable\); the closest is lora") as caught:
        fit(keys, "100KB", methods=["lora"])
    assert f"{closest / 2**10:,.0f} KiB" in str(caught.value)


def test_an_unknown_family_is_said_with_a_bound(tmp_path):
    sizes = {"hidden_size": 100, "num_hidden_layers": 2, "vocab_size": 1000, "intermediate_size": 300}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "brandnew", **sizes}))
    count = 2 * 1000 * 100 + 2 * (4 * 100**2 + 3 * 300 * 100 + 400)
    with pytest.raises(ValueError, match=r"of a family \(brandnew\) that transformers .* does not know") as caught:
        lt.plan({"base": str(tmp_path)})
    assert "width 100, blocks 2, inner width 300, vocabulary 1,000" in str(caught.value)
    assert f"at most {count / 1e9:.3g} billion numbers" in str(caught.value)


def test_what_fits_is_listed_best_first(tmp_path):
    keys = keys_of("llama", {"per_device_train_batch_size": 2, "max_length": 32, "dtype": "bfloat16"}, tmp_path)
    whole = lt.plan(keys)
    limit = whole.peak - 1
    rows = fit(keys, limit, methods=["lora"])
    assert all(row.peak <= limit for row in rows)
    assert all(row.method == "lora" and row.changes for row in rows)
    packed = [row.changes.get("quantize") or "" for row in rows]
    assert packed == sorted(packed)
    assert set(packed) == {"", "int8", "nf4"}
    assert rows[0].changes == {"gradient_checkpointing": True}
    for row in (rows[0], rows[-1]):
        words = shlex.split(row.command)
        assert words[:2] == ["loratory", "train"]
        again = read_settings({**read_keys(words[2:]), "train": "-"})
        plan = lt.plan(planned_settings(again, {"device": "cpu"}))
        assert max(plan.peak, plan.startup_peak) == row.peak, row.command


def test_a_batch_of_six_is_cut_down_to_single_rows(tmp_path):
    asked = {
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "dtype": "bfloat16",
        "quantize": "int8",
    }
    keys = keys_of("llama", {**asked, "gradient_checkpointing": True, "max_length": 256}, tmp_path)
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 12}
    rows = fit(keys, lt.plan({**keys, **cut}).peak, methods=["lora"])
    assert [row.changes for row in rows] == [cut]


def test_methods_planned_side_by_side_come_to_the_same(tmp_path, monkeypatch):
    keys = {"base": STORIES, "max_length": 16, "per_device_train_batch_size": 1, "dtype": "bfloat16", "quantize": "nf4"}
    code = f"""
import json
from loratory.train.fit import fit
said = []
rows = fit({keys!r}, "1GB", methods=["vpt", "lora", "prompt-tuning"], say=said.append)
print(json.dumps([said, [row.to_json() | {{"step_seconds": None}} for row in rows]]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    told, together = json.loads(out.splitlines()[-1])
    said = []
    monkeypatch.setattr(threading, "active_count", lambda: 2)  # other threads: nothing is forked
    rows = fit(keys, "1GB", methods=["vpt", "lora", "prompt-tuning"], say=said.append)
    assert [row.to_json() | {"step_seconds": None} for row in rows] == together  # this machine may be timed, or not
    assert {row.method for row in rows} == {"lora", "prompt-tuning"}
    assert said == told
    assert [line.split(":")[0] for line in said] == ["vpt", "lora", "prompt-tuning"]


def test_a_run_says_what_was_predicted_and_what_came(tmp_path):
    rows = [{"prompt": f"place {i}", "completion": "It is there. " * 30} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = f"""
import json
from loratory.train import train
result = train(base={STORIES!r}, train={str(tmp_path / "train.jsonl")!r}, output_dir={str(tmp_path / "out")!r}, max_steps=2, max_length=256,
               eval_before=False, device="cpu", say=lambda line: None)
print(json.dumps([result.predicted_peak, result.training_peak, str(result)]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    predicted, came, said = json.loads(out.splitlines()[-1])
    plan = lt.plan({"base": STORIES, "max_length": 256, "device": "cpu"})
    assert predicted <= plan.peak
    assert predicted > plan.peak / 4
    assert predicted / 2 < came < 4 * predicted + 128 * 2**20
    assert f"memory of a training step: predicted {predicted / 2**20:,.0f} MiB, came {came / 2**20:,.0f} MiB" in said
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (record["predicted_peak"], record["training_peak"]) == (predicted, came)


def test_nothing_is_said_of_a_peak_that_is_not_known():
    assert "memory of" not in str(Result("out", predicted_peak=10, training_peak=None))
