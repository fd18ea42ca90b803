"""Claims about time: two jobs by turns on one thread, in processor seconds, so that what else the machine does matters little."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

import loratory as lt
from loratory.catalogue.digits import one_thread
from loratory.catalogue.properties import Found, adapted, layer
from loratory.methods.registry import method_class
from loratory.ops.dct import dct_matrix

Job = Callable[[], Any]


@one_thread()
def over(first: Job, second: Job, rounds: int) -> Found:
    """Median of the first job's seconds over the second's of the same round, and medians of both; a round before is not counted."""
    seconds: list[list[float]] = []
    for _ in range(rounds + 1):
        row = []
        for job in (first, second):
            began = time.thread_time()
            job()
            row.append(time.thread_time() - began)
        seconds.append(row)
    kept = seconds[1:]
    ratios = [one / other for one, other in kept]
    return {
        "value": median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "milliseconds of the first": 1000 * median(row[0] for row in kept),
        "milliseconds of the second": 1000 * median(row[1] for row in kept),
    }


def step_of(side: Mapping[str, Any], size: int, tokens: int) -> Job:
    """A step of AdamW on one adapted square layer whose input has a gradient, too. side: method, options."""
    model = adapted(layer(size, size, 0), method_class(side["method"])(**side.get("options", {})))
    optimizer = torch.optim.AdamW(lt.param_groups(model, lr=1e-3))
    lt.drive(model, optimizer, 1000)
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def step_time(*, first: Mapping[str, Any], second: Mapping[str, Any], size: int, tokens: int, rounds: int) -> Found:
    """Time of a layer's step: the first method's over the second's."""
    return over(step_of(first, size, tokens), step_of(second, size, tokens), rounds)


def transform_time(*, sizes: Sequence[int], rounds: int) -> Found:
    """Time of an inverse cosine transform as two real products over that of a complex inverse FFT: the largest over square sizes."""
    found: Found = {}
    for size in sizes:
        C = dct_matrix(size, torch.device("cpu"), torch.float32)
        S = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        F = torch.complex(S, S.T.contiguous())
        each = over(lambda C=C, S=S: C.T @ S @ C, lambda F=F: torch.fft.ifft2(F).real, rounds)  # type: ignore[misc]
        found |= {f"{name} at {size}": value for name, value in each.items()}
    return {"value": max(found[f"value at {size}"] for size in sizes), **found}


def operation_time(*, width: int, fraction: float, rank: int, rounds: int) -> Found:
    """Time of W += B A over that of writing a share of W's entries at their places."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(width, width, generator=generator)
    B, A = torch.randn(width, rank, generator=generator), torch.randn(rank, width, generator=generator)
    places = torch.randperm(W.numel(), generator=generator)[: round(fraction * W.numel())].sort().values
    values, line = torch.randn(len(places), generator=generator), W.clone().view(-1)
    return over(lambda: W.add_(B @ A), lambda: line.scatter_(0, places, values), rounds)


def switch_time(*, widths: Sequence[Sequence[int]], layers: int, fraction: float, rank: int, rounds: int) -> Found:
    """Time of W -= B A of one adapter and W += B A of another over that of `loratory.switch`, over layers of blocks of [out, in] widths."""
    generator = torch.Generator().manual_seed(0)
    model: Any = nn.Sequential(*(nn.Linear(inside, out, bias=False) for _ in range(layers) for out, inside in widths))
    with torch.no_grad():
        for name in ("a", "b"):
            lt.adapt(model, lt.SHiRA(fraction=fraction), "all-linear", name=name)
        weights = [each.weight.detach().clone() for each in model]
        shapes = [W.shape for W in weights]
        loras = [
            [(torch.randn(out, rank, generator=generator), torch.randn(rank, inside, generator=generator))
             for out, inside in shapes]
            for _ in "ab"
        ]  # fmt: skip
        at = {"lora": 0, "shira": 0}

        def fuse() -> None:
            for W, old, new in zip(weights, loras[at["lora"]], loras[1 - at["lora"]], strict=True):
                W.addmm_(*old, alpha=-1)
                W.addmm_(*new)
            at["lora"] = 1 - at["lora"]

        def switch() -> None:
            at["shira"] = 1 - at["shira"]
            lt.switch(model, "ab"[at["shira"]])

        return over(fuse, switch, rounds)


TIMING: dict[str, Callable[..., Found]] = {
    each.__name__: each for each in (step_time, transform_time, operation_time, switch_time)
}
