"""Own loops under DDP and FSDP2."""

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import loratory as lt

from .launch import launch


def difference(one: Path, other: Path) -> float:
    """Largest difference of two saved adapters that hold the same tensors."""
    mine, theirs = (load_file(folder / "adapter.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(mine[key].shape == theirs[key].shape and mine[key].numel() for key in mine)
    return max(float((mine[key] - theirs[key]).abs().max()) for key in mine)


def test_ddp_and_fsdp2_train_and_save_what_one_process_does(tmp_path: Path) -> None:
    printed, silent = launch("-m", "tests.processes.loops", tmp_path)
    assert silent == ""
    found = json.loads(printed)
    losses = found["losses"]
    assert losses["lean one"] == pytest.approx(losses["lora one"], rel=1e-5)
    for method in ("lora", "lean", "dora", "mos"):
        one = found["losses"][f"{method} one"]
        assert one[-1] < 0.9 * one[1]
        for kind in ("ddp", "fsdp"):
            assert max(abs(a - b) / a for a, b in zip(one, found["losses"][f"{method} {kind}"], strict=True)) < 1e-5
            assert difference(tmp_path / f"{method} one", tmp_path / f"{method} {kind}") < 1e-5
            records = [lt.inspect(tmp_path / f"{method} {each}") for each in ("one", kind)]
            assert records[0].base == records[1].base  # names, class, sampled numbers
            assert records[0].tensors == records[1].tensors
    assert max(found["switched"].values()) < 1e-4, found["switched"]
    refused = found["refused"]
    sharded = "the model is sharded by fully_shard, so "
    assert refused["merge"].startswith(sharded + "no process holds a whole weight to merge into; save the adapter and")
    assert refused["peft"].startswith(sharded + "no process holds whole tensors to export")
    assert refused["detach"].startswith(
        sharded + "it keeps the adapters it was sharded with; use loratory.disabled(model)"
    )
    assert refused["use"].startswith(
        sharded + "'model.norm', which is trained in full, keeps the tensors it was sharded with"
    )
    assert "is already sharded by fully_shard" in refused["adapt"]
    assert "wrapped in DistributedDataParallel already" in refused["load into ddp"]
    assert refused["unreached"].startswith("layer 'idle' got no gradient in the first step")
    assert not (tmp_path / "peft").exists()


@pytest.mark.slow
def test_trainer_and_accelerate_save_whole_adapters_of_a_sharded_model(tmp_path: Path) -> None:
    launch("-m", "tests.processes.others", tmp_path)
    assert difference(tmp_path / "by trainer", tmp_path / "by all") == 0.0
    assert difference(tmp_path / "from dict", tmp_path / "gathered") == 0.0
    assert difference(tmp_path / "alone", tmp_path / "gathered") < 1e-5
    base = lt.inspect(tmp_path / "alone").base
    for saved in ("by trainer", "by all", "from dict", "gathered"):
        assert lt.inspect(tmp_path / saved).base == base


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero3_trains_and_saves_what_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launch("-m", "tests.processes.zero3", tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    for method in ("lora", "dora"):
        one, sharded = found[f"{method} one"], found[f"{method} zero3"]
        assert one[-1] < 0.9 * one[1]
        assert max(abs(a - b) / a for a, b in zip(one, sharded, strict=True)) < 1e-5
        assert difference(tmp_path / f"{method} one", tmp_path / f"{method} zero3") < 1e-5
        records = [lt.inspect(tmp_path / f"{method} {each}") for each in ("one", "zero3")]
        assert records[0].base == records[1].base
        assert records[0].tensors == records[1].tensors
    assert found["merge"].startswith("the model is sharded by ZeRO-3, so no process holds a whole weight")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_trainer_under_zero3_saves_whole_adapters_or_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    found = {}
    for how in ("alone", "gather", "keep"):
        launch("-m", "tests.processes.zero3_trainer", tmp_path, how, count=1 if how == "alone" else 2)
        found[how] = json.loads((tmp_path / f"{how}.json").read_text())
    one = found["alone"]["losses"]
    assert len(one) == 3
    assert max(abs(a - b) / a for a, b in zip(one, found["gather"]["losses"], strict=True)) < 1e-5
    assert difference(tmp_path / "alone", tmp_path / "gather") < 1e-5
    assert lt.inspect(tmp_path / "alone").base == lt.inspect(tmp_path / "gather").base
    assert "lacks 'model.layers.0.self_attn.q_proj.loratory.default.A'" in found["keep"]["refused"]
    assert "where stage3_gather_16bit_weights_on_model_save is true" in found["keep"]["refused"]
    assert not (tmp_path / "keep").exists()
    assert found["keep"]["adapt"].startswith("the model is already sharded by ZeRO-3, so new adapters would not be")
