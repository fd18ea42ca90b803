"""An adapter belongs to one base: another one is refused, with what differs first."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loratory as lt
from tests.oracle.pairs import randomised


def net(width: int = 8, depth: int = 2) -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(*(nn.Linear(6 if i == 0 else width, width) for i in range(depth)), nn.Linear(width, 3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = net()
    lt.adapt(model, lt.LoRA(rank=2), ["0", "1"], also_train=["2"])
    randomised(model)
    lt.save(model, tmp_path / "a")
    return tmp_path / "a"


def refused(model: nn.Module, folder: Path, message: str, **options: Any) -> None:
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        lt.load(model, folder, **options)
    assert [type(m) for m in model.modules()] == classes
    assert not any("loratory" in n for n, _ in model.named_modules())


def test_the_first_layer_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    refused(
        net(width=10),
        folder,
        r"layer '0.weight' is \(10, 6\) here, but \(8, 6\) in the adapter's base; load the base it was made for",
    )


def test_missing_and_further_layers(folder: Path) -> None:
    refused(
        net(depth=1)[:1],
        folder,
        r"made for a Sequential with a parameter '1.weight' \(8, 8\), which this Sequential does not have",
    )
    more = nn.Sequential(*net(), nn.Linear(3, 3))
    refused(
        more,
        folder,
        r"this Sequential has a parameter '3.bias' \(3,\), which the adapter's base \(Sequential\) did not have",
    )


def test_the_same_shapes_with_other_weights(folder: Path) -> None:
    torch.manual_seed(5)
    other = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    message = r"layer '0.weight' holds other numbers than in the adapter's base \(shapes agree\)"
    refused(other, folder, message)
    refused(other, folder, message, other_precision=True)


def test_what_the_adapter_holds_itself_may_differ(folder: Path) -> None:
    model = net()
    nn.init.zeros_(model[2].weight)
    lt.load(model, folder)
    assert bool(model[2].weight.any())


def test_another_precision_only_when_told(folder: Path) -> None:
    model = net().bfloat16()
    refused(
        model,
        folder,
        r"differs from the adapter's base by rounding: the base was float32, this one is bfloat16; .*other_precision=True",
    )
    lt.load(model, folder, other_precision=True)
    full = net()
    lt.load(full, folder)
    x = torch.randn(4, 6)
    with torch.no_grad():
        assert torch.allclose(model(x.bfloat16()).float(), full(x), atol=0.1)


def test_another_version_in_the_same_precision_only_when_told(folder: Path) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(1.0001)
    refused(
        model,
        folder,
        r"layer '0.weight' holds slightly other numbers than in the adapter's base, though both are float32",
    )
    lt.load(model, folder, other_precision=True)


def test_a_transformers_base_is_named(stories: Callable[[], Any], tmp_path: Path) -> None:
    model, other = stories(), stories()
    lt.adapt(model, lt.LoRA(rank=1), ["q_proj"])
    lt.save(model, tmp_path)
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    with pytest.raises(
        ValueError,
        match=r"layer 'model.norm.weight' holds other numbers.*load the base it was made for \('.*stories260k'\)",
    ):
        lt.load(other, tmp_path)


def test_a_base_on_which_another_adapter_is_active_is_still_that_base(folder: Path) -> None:
    model = net()
    lt.adapt(model, lt.LoRA(rank=1), ["0"], also_train=["1", "2"], name="first")
    randomised(model)
    lt.load(model, folder, name="second")
    alone = net()
    lt.load(alone, folder)
    x = torch.randn(4, 6)
    with torch.no_grad():
        assert torch.equal(model(x), alone(x))
    assert copy.deepcopy(model)(x).shape == (4, 3)
