"""PEFT's target_parameters: adapters of bare parameters, in both directions, with equal outputs."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loratory as lt
from tests.runtime.moe import IDS, moe

from .pairs import assert_equal, loaded, outputs, peft_adapted, randomised, read_by_peft, saved, train

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "both stacks": ("mixtral", {"r": 3, "lora_alpha": 5, "target_parameters": BOTH}),
    "one stack": ("qwen3", {"r": 2, "target_parameters": BOTH[1:]}),
    "rsLoRA": ("qwen3", {"r": 2, "use_rslora": True, "target_parameters": BOTH}),
    "beside linears": ("qwen2", {"r": 2, "target_modules": ["q_proj", "o_proj"], "target_parameters": BOTH[:1]}),
    "ranks and alphas": (
        "mixtral",
        {
            "r": 2,
            "target_parameters": BOTH,
            "rank_pattern": {"experts.down_proj": 3},
            "alpha_pattern": {r"layers\.1\..*gate_up_proj": 3},
        },
    ),
    "stored transposed": ("gpt-oss", {"r": 2, "target_parameters": BOTH}),
    "stored transposed, unknown to PEFT": (
        "llama4",
        {"r": 2, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "one block": ("qwen3", {"r": 2, "target_parameters": ["model.layers.1." + BOTH[0]]}),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_to_here_and_back(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    base = moe(family)
    theirs = peft_adapted(base, **{"target_modules": []} | options)
    folder = saved(theirs, tmp_path / "a")
    mine = loaded(base, folder, trainable=True)
    assert_equal(outputs(mine, IDS), outputs(theirs, IDS), base=outputs(base, IDS))
    lt.export(mine, tmp_path / "b", to="peft")
    assert_equal(outputs(read_by_peft(base, tmp_path / "b"), IDS), outputs(theirs, IDS))
    again = lt.trained(loaded(base, tmp_path / "b", trainable=True))
    wanted = lt.trained(mine)
    assert list(again) == list(wanted)
    assert all(torch.equal(again[n], wanted[n]) for n in wanted)
    numbers = sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n)
    assert lt.summary(mine).trained == numbers == lt.inspect(folder).numbers == lt.inspect(tmp_path / "b").numbers
    if "rank_pattern" not in options:
        assert {s.get("rank") for s in lt.inspect(folder).layers.values()} == {None}


def test_the_same_training_run(tmp_path: Path) -> None:
    base = moe("mixtral")
    theirs = peft_adapted(base, r=2, lora_alpha=4, target_modules=[], target_parameters=BOTH)
    folder = saved(theirs, tmp_path / "a")
    theirs = read_by_peft(base, folder, is_trainable=True)
    mine = loaded(base, folder, trainable=True)
    runs = [
        train([p for p in m.parameters() if p.requires_grad], lambda i, m=m: m(IDS, labels=IDS).loss, steps=6, lr=1e-3)
        for m in (theirs, mine)
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
    assert runs[1][-1] < runs[1][0]


class Odd(nn.Module):
    """Layers whose weights PEFT can target as parameters."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed, self.fc, self.conv1d = nn.Embedding(11, 6), nn.Linear(6, 6), Conv1D(5, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.conv1d(torch.tanh(self.fc(x + self.attention(x, x, x)[0])))


@pytest.mark.parametrize("name", ["embed.weight", "fc.weight", "conv1d.weight", "attention.in_proj_weight"])
def test_weights_of_layers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    base, x = Odd().eval(), torch.arange(10).reshape(2, 5)
    theirs = peft_adapted(base, r=2, target_modules=[], target_parameters=[name])
    mine = loaded(base, saved(theirs, tmp_path / "a"))
    assert_equal(outputs(mine, x), outputs(theirs, x), base=outputs(base, x))
    lt.export(mine, tmp_path / "b", to="peft")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ([name] if "attention" in name else None)
    if name != "embed.weight":  # PEFT's own LoRA of an embedding is another layer
        assert_equal(outputs(read_by_peft(base, tmp_path / "b"), x), outputs(theirs, x))


@pytest.mark.parametrize("axes", ["out in", "in out"])
def test_a_parameter_that_only_the_user_knows(axes: str, tmp_path: Path) -> None:
    class Kernel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(6, 4) if axes == "in out" else torch.randn(4, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.kernel if axes == "in out" else x @ self.kernel.T

    base, x = nn.Sequential(Kernel(), nn.Tanh(), nn.Linear(4, 3)), torch.randn(5, 6)
    mine = copy.deepcopy(base)
    lt.adapt(mine, lt.LoRA(rank=2, alpha=3), parameters={"kernel": axes})
    randomised(mine)
    lt.export(mine, tmp_path / "a", to="peft")
    assert_equal(outputs(read_by_peft(base, tmp_path / "a"), x), outputs(mine, x), base=outputs(base, x))
    assert_equal(
        outputs(loaded(base, tmp_path / "a"), x), outputs(mine, x)
    )  # read as PEFT reads it: the update is the same


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    model = moe("qwen3")
    lt.adapt(model, lt.DoRA(rank=2), "experts")
    with pytest.raises(ValueError, match=r"gate_up_proj' is a bare parameter, for which PEFT has no DoRA"):
        lt.export(model, tmp_path / "a", to="peft")
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(6, 2)})
    lt.adapt(attention, lt.LoRA(rank=2))
    with pytest.raises(
        ValueError, match=r"layer 'a.out_proj' is read by its MultiheadAttention, where PEFT's adapter has no effect"
    ):
        lt.export(attention, tmp_path / "b", to="peft")


def test_peft_adapter_on_an_output_projection_that_is_never_called(tmp_path: Path) -> None:
    base = Odd().eval()
    folder = saved(peft_adapted(base, r=2, target_modules=["fc"]), tmp_path / "a")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["fc", "out_proj"]}))
    with pytest.raises(
        ValueError, match=r"targets 'attention.out_proj', whose MultiheadAttention.*PEFT's adapter there has no effect"
    ):
        loaded(base, folder)


def test_a_parameter_that_the_base_does_not_have(tmp_path: Path) -> None:
    folder = saved(peft_adapted(moe("mixtral"), r=2, target_modules=["q_proj"], target_parameters=BOTH), tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"'mlp.experts.down_proj' among its target_parameters.*load the base it was made for"
    ):
        loaded(moe("llama4"), folder)
