"""Combined adapters against PEFT's add_weighted_adapter."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.runtime.combine import SCHEMES
from tests.oracle.pairs import assert_equal, outputs, peft_adapted, quiet, randomised, saved
from tests.runtime.models import IDS, tiny_gpt2


class Net(nn.Module):
    """An embedding, convolutions and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(11, 6)
        self.conv, self.point = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.up, self.down = nn.Linear(24, 12), nn.Linear(12, 7, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.point(torch.tanh(self.conv(self.embed(ids).unsqueeze(1))))
        return self.down(torch.tanh(self.up(x.transpose(1, 2).flatten(2))))


def pair(base: nn.Module, configs: list[dict[str, Any]], folder: Path) -> tuple[Any, nn.Module, list[str]]:
    """PEFT's model and ours with the same adapters."""
    import peft

    theirs = peft_adapted(base, **configs[0])
    names = ["default"]
    for i, config in enumerate(configs[1:]):
        names.append(f"other{i}")
        with quiet():
            theirs.add_adapter(names[-1], peft.LoraConfig(**config))
            theirs.set_adapter(names[-1])
        randomised(theirs, seed=7 + i)
    saved(theirs, folder)
    ours = copy.deepcopy(base)
    for name in names:
        lt.load(ours, folder if name == "default" else folder / name, name=name)
    return theirs.eval(), ours, names


TARGETS = {"target_modules": ["embed", "conv", "point", "up", "down"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {"rank": 3},
    "ties": {"density": 0.6},
    "dare_linear": {"density": 0.7},
    "dare_ties": {"density": 0.7},
    "magnitude_prune": {"density": 0.4},
    "ties_svd": {"density": 0.6, "rank": 4},
    "dare_linear_svd": {"density": 0.7, "rank": 3},
    "dare_ties_svd": {"density": 0.7},
    "magnitude_prune_svd": {"density": 0.5},
}


@pytest.mark.parametrize("weights", [[0.7, 0.4, 1.3], [1.0, -0.5, 0.2]], ids=["positive", "negative"])
@pytest.mark.parametrize("how", SCHEMES)
def test_every_scheme_of_peft(how: str, weights: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = Net().eval()
    ends = ["up", "down", "conv", "point"]
    if not (how.startswith("dare") and how.endswith("svd")):  # there PEFT draws over the table, we over its transpose
        ends.append("embed")
    configs = [
        {"r": 2, "lora_alpha": 3, "target_modules": ends},
        {"r": 2, "lora_alpha": 1, "use_rslora": True, "target_modules": ends},
        {"r": 2, "lora_alpha": 2, "target_modules": [n for n in ends if n not in ("conv", "point")]},
    ]
    theirs, ours, names = pair(base, configs, tmp_path)
    options = SETTINGS[how]
    draw, generator = torch.bernoulli, torch.Generator().manual_seed(5)
    with quiet(), monkeypatch.context() as patch:
        patch.setattr(torch, "bernoulli", lambda p: draw(p, generator=generator))
        theirs.add_weighted_adapter(
            names, weights, "new", how, svd_rank=options.get("rank"), density=options.get("density")
        )
        theirs.set_adapter("new")
    lt.combine(ours, names, "new", how, weights=weights, seed=5, **options)
    assert_equal(outputs(ours, IDS), outputs(theirs, IDS), base=outputs(base, IDS))


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_both_ways_to_elect_a_sign_on_transposed_layers(sign: Any, tmp_path: Path):
    base = tiny_gpt2()
    configs = [
        {"r": 2, "lora_alpha": a, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True} for a in (2, 5)
    ]
    theirs, ours, names = pair(base, configs, tmp_path)
    with quiet():
        theirs.add_weighted_adapter(names, [1.0, 2.0], "new", "ties", density=0.5, majority_sign_method=sign)
        theirs.set_adapter("new")
    lt.combine(ours, names, "new", "ties", weights=[1.0, 2.0], density=0.5, sign=sign)
    assert_equal(outputs(ours, IDS), outputs(theirs, IDS), base=outputs(base, IDS))


def test_adapters_of_different_ranks(tmp_path: Path):
    base = Net().eval()
    theirs, ours, names = pair(base, [{"r": 2, **TARGETS}, {"r": 4, **TARGETS}], tmp_path)
    for how in ("cat", "svd"):
        with quiet():
            theirs.add_weighted_adapter(names, [0.5, 2.0], how, how)
            theirs.set_adapter(how)
        lt.combine(ours, names, how, how, weights=[0.5, 2.0])
        assert_equal(outputs(ours, IDS), outputs(theirs, IDS), base=outputs(base, IDS))
