"""The same adapter in PEFT and here."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import loratory as lt


@contextmanager
def quiet() -> Iterator[None]:
    """Without PEFT's advice."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        warnings.filterwarnings("ignore", category=UserWarning)
        yield


def randomised(model: nn.Module, base: nn.Module | None = None, seed: int = 1) -> None:
    """Move every trained tensor away from its start, lengths of DoRA by a factor near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and p.is_floating_point():
                noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                if "magnitude" in name or name.endswith(".m"):
                    p.mul_(1 + 0.1 * noise)
                else:
                    p.add_(0.1 * noise)


def peft_adapted(base: nn.Module, **config: Any) -> Any:
    """A copy of the base with a PEFT adapter that does something."""
    with quiet():
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    randomised(model)
    return model.eval()


def saved(model: Any, folder: Path, **options: Any) -> Path:
    with quiet():
        model.save_pretrained(folder, **options)
    return folder


def read_by_peft(base: nn.Module, folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():  # missing or unexpected keys are only a warning in PEFT
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*tie.*")
        warnings.filterwarnings("ignore", message=".*groups > 1.*")
        warnings.filterwarnings(
            "ignore", message="fan_in_fan_out is set to True but the target module is `torch.nn.Linear`"
        )
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, **options).eval()


def loaded(base: nn.Module, folder: Path, **options: Any) -> nn.Module:
    model = copy.deepcopy(base)
    lt.load(model, folder, **options)
    return model


def outputs(model: Any, *inputs: Any) -> Tensor:
    with torch.no_grad():
        out = model(*inputs)
    return (out.logits if hasattr(out, "logits") else out).double()


def assert_equal(a: Tensor, b: Tensor, *, base: Tensor | None = None) -> None:
    """Equal within float32 rounding; and far from the base's outputs, so that the adapter is known to act."""
    scale = float(b.abs().max())
    assert float((a - b).abs().max()) <= 2e-5 * scale
    if base is not None:
        assert float((a - base).abs().max()) > 1e-3 * scale


def train(parameters: list[nn.Parameter], step: Any, *, steps: int = 20, lr: float = 1e-2) -> list[float]:
    """AdamW with its default decay."""
    optimizer, losses = torch.optim.AdamW(parameters, lr=lr), []
    for i in range(steps):
        optimizer.zero_grad()
        loss = step(i)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
