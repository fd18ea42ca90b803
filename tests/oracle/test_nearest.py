"""Any method exported as a plain LoRA: what PEFT then computes, and the error that was stated."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.runtime.layer import layers_of
from loratory.runtime.low_rank import Approximation, update
from tests.laws.kinds import Case
from tests.laws.table import CASES
from tests.oracle.pairs import assert_equal, outputs, randomised, read_by_peft
from tests.runtime.models import IDS, tiny_bert, tiny_gpt2

FIT = [
    p
    for p in CASES
    if not any(
        word in (p.id or "") for word in ("dilated", "circular", "reflect", "replicate", "MultiheadAttention")
    )  # PEFT's geometry differs, or its adapter has no effect
]


@pytest.mark.parametrize("case", FIT)
def test_every_method_on_every_layer_is_exact_at_full_rank(case: Case, tmp_path: Path):
    model = case.moved()
    base, x = case.plain(), case.inputs()
    record = lt.export(model, tmp_path / "out", to="peft", rank=1000, limit=1e-5)
    assert isinstance(record, Approximation)
    assert record.total <= 1e-5
    assert set(record.layers) == set(layers_of(model))
    assert_equal(outputs(read_by_peft(base, tmp_path / "out"), x), outputs(model, x), base=outputs(base, x))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_dora"] is False
    assert config["use_rslora"] is False


def test_factors_of_the_rank_are_written_as_they_are(tmp_path: Path):
    model = tiny_gpt2()
    base = copy.deepcopy(model)
    lt.adapt(model, lt.LoRA(rank=3, alpha=5, rslora=True), "c_attn")
    randomised(model)
    record = lt.export(model, tmp_path / "out", to="peft", rank=3, limit=0.0)
    assert isinstance(record, Approximation)
    assert (record.total, set(record.ranks.values())) == (0.0, {3})
    assert_equal(outputs(read_by_peft(base, tmp_path / "out"), IDS), outputs(model, IDS), base=outputs(base, IDS))
    again = copy.deepcopy(base)
    lt.load(again, tmp_path / "out")
    for name, layer in layers_of(model).items():
        A: Any = layer["default"].A  # type: ignore[union-attr]
        assert torch.equal(layers_of(again)[name]["default"].A, A)  # type: ignore[union-attr]


def test_dora_at_a_lower_rank_states_its_error(stories: Callable[[], Any], tmp_path: Path):
    model, base = stories(), stories()
    lt.adapt(model, lt.DoRA(rank=4), "all-linear")
    randomised(model)
    updates = {n: update(layer, layer["default"]) for n, layer in layers_of(model).items()}  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"adapter 'default' as LoRA: \d+ layers of rank 8, relative error .* above limit=0.05"
    ):
        lt.export(model, tmp_path / "out", to="peft", rank=8)
    assert not (tmp_path / "out").exists()
    record = lt.export(model, tmp_path / "out", to="peft", rank=8, limit=0.5)
    assert isinstance(record, Approximation)
    assert 0.05 < record.total < 0.5
    again = copy.deepcopy(base)
    lt.load(again, tmp_path / "out")
    square = [0.0, 0.0]
    for name, D in updates.items():
        found = update(layers_of(again)[name], layers_of(again)[name]["default"])  # type: ignore[arg-type]
        error, norm = float((found - D).norm()), float(D.norm())
        assert record.layers[name] == pytest.approx(error / norm, rel=1e-4)
        s = torch.linalg.svdvals(D.double())
        assert record.layers[name] == pytest.approx(float(s[8:].norm() / s.norm()), rel=1e-4)
        square[0] += error**2
        square[1] += norm**2
    assert record.total == pytest.approx((square[0] / square[1]) ** 0.5, rel=1e-4)
    assert_equal(outputs(read_by_peft(base, tmp_path / "out"), IDS), outputs(again, IDS))


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
def test_a_model_trained_in_full(make: Callable[[], Any], tmp_path: Path):
    """A weight moved by rank 2 comes back exactly; norms and biases go beside."""
    model, base = make(), make()
    lt.adapt(model, lt.Full())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in lt.trained(model).values():
            left, right = (torch.randn(n, 2, generator=generator) for n in (p.shape[0], p.shape[-1]))
            p += 0.1 * (left @ right.T) if p.dim() == 2 else 0.1 * left[:, 0]
    record = lt.export(model, tmp_path / "out", to="peft", rank=2, limit=1e-4)
    assert isinstance(record, Approximation)
    assert record.total < 1e-5
    assert_equal(outputs(read_by_peft(base, tmp_path / "out"), IDS), outputs(model, IDS), base=outputs(base, IDS))


def test_modules_trained_beside_go_along(tmp_path: Path):
    model = tiny_bert()
    base = copy.deepcopy(model)
    lt.adapt(model, lt.DoRA(rank=2), "query", also_train="classifier")
    randomised(model)
    lt.export(model, tmp_path / "out", to="peft", rank=16)
    assert_equal(outputs(read_by_peft(base, tmp_path / "out"), IDS), outputs(model, IDS), base=outputs(base, IDS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "peft", "rank": 0}, r"rank is 0; it must be a positive integer"),
        ({"to": "peft", "rank": 2, "limit": -1.0}, r"limit is -1.0; it must be a relative error, 0 or more"),
        ({"to": "peft", "rank": 2, "limit": float("nan")}, r"limit is nan"),
        ({"to": "merged", "rank": 2}, r"rank is 2, but to='merged' writes whole weights"),
        ({"to": "peft", "rank": 2, "name": "z"}, r"there is no adapter 'z'"),
        (
            {"to": "peft", "rank": 2, "name": "head"},
            r"adapter 'head' \(HeadOnly\) changes no layer's weight by factors",
        ),
    ],
)
def test_refusals(options: dict[str, Any], message: str, tmp_path: Path):
    model = tiny_bert()
    lt.adapt(model, lt.HeadOnly(), name="head")
    lt.adapt(model, lt.DoRA(rank=2), name="dora")
    with pytest.raises(ValueError, match=message):
        lt.export(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_update_of_zero(tmp_path: Path):
    model = nn.Sequential(nn.Linear(4, 4))
    lt.adapt(model, lt.DoRA(rank=2), "0")
    record = lt.export(model, tmp_path / "out", to="peft", rank=2)
    assert isinstance(record, Approximation)
    assert record.total < 0.05 or record.total == 0.0
