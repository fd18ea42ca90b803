"""Bases that follow from the base's weights: a file may hold a checksum in their place, and loading makes them again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loratory as lt
from loratory.methods import loldu
from loratory.ops import spectral
from tests.oracle.pairs import randomised

MADE = {
    "lora-xs": (lt.LoRAXS, {"rank": 4, "gradient": "projected"}, {"A", "B", "P", "Q"}),
    "svfit": (lt.SVFit, {"rank": 4}, {"U", "V"}),
    "loldu": (lt.LoLDU, {"rank": 4, "start": "normal"}, {"L", "U"}),
    "salt": (lt.SALT, {"rank": 2}, {"U", "V"}),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(5, 25).reshape(2, 10)).logits


@pytest.mark.parametrize("case", MADE)
def test_a_file_without_bases_is_the_same_adapter(case: str, stories: Callable[[], Any], tmp_path: Path) -> None:
    make, options, names = MADE[case]
    sizes = {}
    for basis in ("file", "weight"):
        model, other = stories(), stories()
        lt.adapt(model, make(**options, basis=basis), ["q_proj", "down_proj"])
        randomised(model)
        lt.save(model, tmp_path / basis)
        lt.adapt(other, lt.LoRA(rank=2), ["q_proj", "up_proj"], also_train=["model.norm"], name="beside")
        randomised(other)
        lt.load(other, tmp_path / basis, trainable=True)
        lt.use(other, "default")
        assert torch.equal(logits(other), logits(model))
        held = {key.rpartition("/")[2] for key in lt.inspect(tmp_path / basis).tensors}
        assert names & held == (names if basis == "file" else set())
        sizes[basis] = (tmp_path / basis / "adapter.safetensors").stat().st_size
    assert sizes["weight"] < sizes["file"] / 2


@pytest.mark.parametrize("case", MADE)
def test_bases_that_come_out_otherwise_are_refused(
    case: str, stories: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, options, _ = MADE[case]
    model, other = stories(), stories()
    lt.adapt(model, make(**options, basis="weight"), ["q_proj"])
    lt.save(model, tmp_path)
    right, factors = spectral._decomposed, loldu.ldu
    monkeypatch.setattr(spectral, "_kept", lambda *a: None)
    monkeypatch.setattr(spectral, "_decomposed", lambda *a: tuple(-part for part in right(*a)))
    monkeypatch.setattr(loldu, "ldu", lambda W: factors(1.0001 * W))
    with pytest.raises(ValueError, match=r"holds the checksum of tensor .* makes others of the base's weight"):
        lt.load(other, tmp_path)
    assert torch.equal(logits(other), logits(stories()))


def test_drawn_projections_cannot_be_made_again() -> None:
    with pytest.raises(ValueError, match="start 'random' draws A and B; keep them with basis='file'"):
        lt.LoRAXS(start="random", basis="weight")
