"""Bare parameters in PEFT's files (LoraConfig(target_parameters=...)): which they are, their keys, and our A and B.

PEFT wraps the owner once for each parameter, the one registered last outermost, and keys tell the wrapper, not the parameter:
    experts.lora_A.weight (experts * r, in)              the last parameter of `experts`
    experts.base_layer.lora_B.weight (out, r * experts)  the one before it
The update of entry e is s B[:, :, e] A[e], added to a parameter stored (experts, out, in), and its transpose to one stored
(experts, in, out). PEFT takes a parameter of two dimensions for (out, in), and one of three for (experts, out, in) unless its
module says `is_transposed`, so for one that is stored otherwise its A and B change places.
"""

import math
from typing import Any

from torch import Tensor, nn

from loratory.runtime.layer import is_ours
from loratory.runtime.where import ends_with
from loratory.sites import Bare, Site, known_parameters
from loratory.sites.find import site_class
from loratory.sites.parameter import ParameterSite
from loratory.store.peft_config import CONFIG


def parameter_targets(model: nn.Module, names: list[str] | None) -> dict[str, str]:
    """The parameters that target_parameters means, each with the beginning of its keys in the file."""
    out: dict[str, str] = {}
    lacking = set(names or ())
    for owner, module in model.named_modules():
        if owner and not is_ours(owner) and names:
            own = [f"{owner}.{leaf}" for leaf, p in module._parameters.items() if p is not None]
            own = [n for n in own if ends_with(n, names)]
            out |= {n: f"{owner}." + "base_layer." * (len(own) - 1 - i) for i, n in enumerate(own)}
            lacking -= {key for key in lacking if any(ends_with(n, [key]) for n in own)}
    if lacking:
        raise ValueError(
            f"{CONFIG} has '{min(lacking)}' among its target_parameters, which no parameter of this {type(model).__name__} is called; "
            "load the base it was made for"
        )
    return out


def parameter(model: nn.Module, name: str) -> tuple[str, nn.Module | Bare]:
    """The layer of a targeted parameter: a layer whose weight it is, or the bare parameter, read as PEFT reads it if need be."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    kind = site_class(module) if leaf == "weight" else None
    tensor: Any = module._parameters[leaf]
    if tensor.dim() not in (2, 3) or (kind is not None and kind.kind == "conv"):
        raise ValueError(
            f"{CONFIG} targets the parameter '{name}' {tuple(tensor.shape)}; PEFT adapts those of two or three dimensions"
        )
    if kind is not None:
        return owner, module
    known = known_parameters(model).get(name)
    if known is not None:
        return name, known
    stack = "" if tensor.dim() == 2 else "experts "
    return name, Bare(module, leaf, stack + ("in out" if _peft_transposes(module, tensor) else "out in"))


def shapes(site: Site, rank: int) -> dict[str, tuple[int, ...]]:
    """The two tensors of a parameter in a PEFT file, by the end of their key."""
    _check(site)
    rows, columns = site.weight.shape[-2:]
    if _peft_transposes(site.module, site.weight):
        rows, columns = columns, rows
    entries = math.prod(site.stack)
    return {"lora_A.weight": (rank * entries, columns), "lora_B.weight": (rows, rank * entries)}


def from_peft(site: Site, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Our A and B from a file's tensors, whose shapes are checked."""
    entries = math.prod(site.stack)
    A = A.reshape(entries, -1, A.shape[-1])
    B = B.reshape(B.shape[0], -1, entries).permute(2, 0, 1)
    if _is_turned(site):
        A, B = B.mT, A.mT
    return A.reshape(*site.stack, *A.shape[1:]), B.reshape(*site.stack, *B.shape[1:])


def to_peft(site: Site, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A file's tensors from our A and B."""
    entries = math.prod(site.stack)
    A, B = A.reshape(entries, *A.shape[-2:]), B.reshape(entries, *B.shape[-2:])
    if _is_turned(site):
        A, B = B.mT, A.mT
    return A.reshape(-1, A.shape[-1]), B.permute(1, 2, 0).reshape(B.shape[1], -1)


def _peft_transposes(module: nn.Module, tensor: Tensor) -> bool:
    return tensor.dim() == 3 and bool(getattr(module, "is_transposed", False))


def _is_stored_transposed(site: Site) -> bool:
    if isinstance(site, ParameterSite):
        words = site.axes.split()
        return words.index("in") < words.index("out")
    return site.kind in ("conv1d-transposed", "embedding")


def _is_turned(site: Site) -> bool:
    """Whether PEFT's rows and columns are our columns and rows."""
    return _is_stored_transposed(site) != _peft_transposes(site.module, site.weight)


def _check(site: Site) -> None:
    out = "; leave it out, or use the merged model"
    if isinstance(site, ParameterSite):
        words = site.axes.split()
        if site.is_whole:
            raise ValueError(
                f"layer '{site.name}' is read by its MultiheadAttention, where PEFT's adapter has no effect{out}"
            )
        if len(words) > 3 or (len(words) == 3 and words[0] in ("in", "out")):
            raise ValueError(f"layer '{site.name}' has the axes '{site.axes}', which PEFT's format cannot hold{out}")
    if math.prod(site.stack) == 1 and _peft_transposes(site.module, site.weight):
        raise ValueError(f"layer '{site.name}' is a stack of one entry stored transposed, which PEFT cannot adapt{out}")
