"""The same weights in PEFT's layers and ours: outputs, gradients, 20 AdamW steps."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import loratory as lt
from loratory.runtime.layer import layers_of

from .pairs import peft_adapted, train

KINDS: dict[str, Any] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
}


def linear() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)), torch.randn(3, 6, 7)


def conv1d_transposed() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(Conv1D(5, 7), nn.Tanh(), Conv1D(4, 5)), torch.randn(3, 6, 7)


def conv1d() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv1d(4, 6, 3, padding=1, stride=2), nn.Tanh(), nn.Conv1d(6, 3, 2)), torch.randn(2, 4, 9)


def conv2d() -> tuple[nn.Module, Tensor]:
    layers = nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(6, 4, (2, 1), bias=False)
    return nn.Sequential(*layers), torch.randn(2, 4, 6, 5)


def conv3d() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv3d(4, 6, 2, padding=1), nn.Tanh(), nn.Conv3d(6, 3, (2, 1, 1))), torch.randn(
        2, 4, 4, 4, 3
    )


def embedding() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Embedding(11, 6, padding_idx=0), nn.Tanh(), nn.Linear(6, 4)), torch.randint(0, 11, (3, 8))


LAYERS = [linear, conv1d_transposed, conv1d, conv2d, conv3d, embedding]


def both(base: nn.Module, **kind: Any) -> tuple[Any, nn.Module]:
    """PEFT's adapted copy, and ours with its numbers."""
    theirs = peft_adapted(base, r=3, lora_alpha=5, target_modules=["0", "2"], **kind)
    mine = copy.deepcopy(base)
    method: Any = (lt.DoRA if kind.get("use_dora") else lt.LoRA)(
        rank=3, alpha=5, rslora=kind.get("use_rslora", False), dropout=kind.get("lora_dropout", 0.0)
    )
    lt.adapt(mine, method, ["0", "2"])
    with torch.no_grad():
        for name, layer in layers_of(mine).items():
            there, t = theirs.get_submodule(f"base_model.model.{name}"), layer["default"]
            for key, p in t.named_parameters():
                p.copy_(key_tensor(there, key).reshape(p.shape))
    return theirs, mine


def key_tensor(there: Any, key: str) -> Tensor:
    if key == "m":
        return there.lora_magnitude_vector["default"].weight
    if there.lora_embedding_A:
        return getattr(there, f"lora_embedding_{key}")["default"]
    return getattr(there, f"lora_{key}")["default"].weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_gradients_and_steps(layer: Any, kind: str) -> None:
    base, x = layer()
    theirs, mine = both(base.double(), **KINDS[kind])
    x = x.double() if x.is_floating_point() else x
    y = theirs(x)
    goal = torch.randn_like(y)
    torch.testing.assert_close(mine(x), y)
    assert not torch.allclose(y, base(x))
    for model in (theirs, mine):
        (model(x) - goal).square().mean().backward()
    compared = 0
    for name, holder in layers_of(mine).items():
        there = theirs.get_submodule(f"base_model.model.{name}")
        for key, p in holder["default"].named_parameters():
            assert p.grad is not None
            torch.testing.assert_close(p.grad, key_tensor(there, key).grad.reshape(p.shape))
            compared += 1
    assert compared == (6 if "dora" in kind else 4)
    runs = [
        train([p for p in m.parameters() if p.requires_grad], lambda i, m=m: (m(x) - goal).square().mean())
        for m in (theirs, mine)
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-9)
    assert runs[1][-1] < runs[1][0]
    torch.testing.assert_close(mine(x), theirs(x))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_is_off_in_eval_and_on_in_training(kind: str) -> None:
    base, x = linear()
    theirs, mine = both(base, lora_dropout=0.5, **KINDS[kind])
    torch.testing.assert_close(mine.eval()(x), theirs(x))
    assert not torch.allclose(mine.train()(x), mine.eval()(x))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_in_training_with_the_same_mask(kind: str) -> None:
    base, x = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)), torch.randn(3, 6, 7)
    theirs, mine = both(base, lora_dropout=0.5, **KINDS[kind])
    outputs = []
    for model in (theirs, mine):
        torch.manual_seed(5)
        outputs.append(model.train()(x))
    torch.testing.assert_close(outputs[0], outputs[1])


def test_a_grouped_convolution_trains_as_a_lora_on_each_group() -> None:
    """PEFT's A reads all groups, so its layer is another one; with A zero outside the group both agree."""
    base, x = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2)), torch.randn(2, 4, 5, 5)
    theirs = peft_adapted(base, r=4, lora_alpha=8, target_modules=["0"])
    mine = copy.deepcopy(base)
    lt.adapt(mine, lt.LoRA(rank=2, alpha=4), ["0"])
    there: Any = theirs.get_submodule("base_model.model.0")
    A, B = there.lora_A["default"].weight, there.lora_B["default"].weight
    t: Any = layers_of(mine)["0"]["default"]
    with torch.no_grad():
        A[:2, 2:], A[2:, :2] = 0, 0
        t.A.copy_(torch.stack([A[:2, :2].reshape(2, -1), A[2:, 2:].reshape(2, -1)]))
        t.B.copy_(B.reshape(2, 3, 2))
    torch.testing.assert_close(mine(x), theirs(x))
    for model in (theirs, mine):
        model(x).square().mean().backward()
    torch.testing.assert_close(t.B.grad, B.grad.reshape(2, 3, 2))
    torch.testing.assert_close(t.A.grad[0], A.grad[:2, :2].reshape(2, -1))
    torch.testing.assert_close(t.A.grad[1], A.grad[2:, 2:].reshape(2, -1))
