"""How much two adapters of a model disturb each other when both are in it: `orthogonality`."""

from typing import NamedTuple

import torch
from torch import nn

from loratory.methods.fields import check_choice, check_not_negative
from loratory.ops.orthogonality import Norm, awom, awor
from loratory.runtime.layer import layers_of
from loratory.runtime.low_rank import refuse_broken, update
from loratory.runtime.state import require_adapter, unwrap


class Orthogonality(NamedTuple):
    """Of two updates D1, D2 of one layer; for a stack of matrices their means."""

    magnitude: float  # AWOM: |D1^T D2|; 0: they do not disturb each other
    ratio: float  # AWOR: the share of D1^T D2 that is exactly 0; 1: they do not disturb each other


def orthogonality(
    model: nn.Module, first: str, second: str, *, norm: Norm = "frobenius", tolerance: float = 0.0
) -> dict[str, Orthogonality]:
    """The paper's two measures, AWOM and AWOR, for each layer that both adapters change; see `loratory.ops.orthogonality`.

    For any methods that change a weight. norm: "frobenius" or "spectral", of the magnitude. tolerance: entries up to it count as 0.
    One product in x in is made at a time.
    Raises ValueError for an unknown name, or adapters that have no layer in common.
    Source: arXiv 2406.13175 section 4. Differs: the paper does not say which norm it takes.
    """
    check_choice("norm", norm, ("frobenius", "spectral"))
    check_not_negative("tolerance", tolerance)
    model = unwrap(model)
    for name in (first, second):
        require_adapter(model, name)
    found = {}
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            if first in layer and second in layer:
                for each in (first, second):
                    refuse_broken(layer, layer[each])  # type: ignore[arg-type]
                D1, D2 = (update(layer, layer[each]) for each in (first, second))  # type: ignore[arg-type]
                found[name] = Orthogonality(float(awom(D1, D2, norm).mean()), float(awor(D1, D2, tolerance).mean()))
    if not found:
        raise ValueError(
            f"adapters '{first}' and '{second}' change no layer in common, so nothing of them meets; name two adapters of the same layers"
        )
    return found
