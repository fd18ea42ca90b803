"""Runs on a quantised base: trained, opened again, and written in full precision."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loratory as lt
from loratory.sites.packed import PackedLinear
from loratory.train import train
from loratory.train.opened import open_adapter
from loratory.train.trainer import LoraTrainer

Keys = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_run_on_an_nf4_base(keys: Keys, tmp_path: Path, method: str):
    result = train(**keys(quantize="nf4", method=method), say=str)
    assert result.steps == 4
    opened = open_adapter(result.output_dir)
    assert sum(isinstance(m, PackedLinear) for m in opened.model.modules()) == 35
    ids = torch.arange(5, 25).view(1, 20)
    with torch.no_grad():
        expected = opened.model(ids).logits
    lt.export(opened.model, tmp_path / "full", dequantize=True)
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(tmp_path / "full")(ids).logits, expected, atol=1e-3, rtol=1e-3
        )


def test_an_interrupted_run_goes_on_to_the_same_end(keys: Keys, monkeypatch: pytest.MonkeyPatch):
    whole = train(**keys(quantize="int8", output_dir=keys()["output_dir"] + "-whole"), say=str)
    step = LoraTrainer.training_step

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LoraTrainer, "training_step", interrupted)
        stopped = train(**keys(quantize="int8"), say=str)
    assert stopped.steps == 3
    ended = train(**keys(quantize="int8", resume=True), say=str)
    assert (ended.steps, ended.after["token_loss"]) == (4, whole.after["token_loss"])
    assert lt.inspect(ended.output_dir).base["transforms"] == ["quantize int8 (35 layers)"]
