"""One layer in PEFT's shapes: the tensors of a file, and our A, B and m.

linear, Conv1D   lora_A.weight (r, in), lora_B.weight (out, r), lora_magnitude_vector (out)
embedding        lora_embedding_A (r, vocab), lora_embedding_B (dim, r), lora_magnitude_vector (dim)
convolution      lora_A.weight (r, in, *kernel), lora_B.weight (out, r / groups, 1 ...), lora_magnitude_vector (1, out, 1 ...)

In a grouped convolution PEFT's A reads the inputs of all groups and B those of its own r / groups channels, so an update of the
layer's own weight is one whose A is zero outside its group.
"""

import math

import torch
from torch import Tensor

from loratory.sites.site import Site
from loratory.store import peft_parameter


def check_conv(site: Site, dora: bool) -> None:
    """Refuse a convolution that PEFT runs in another geometry than the layer's own."""
    if site.kind != "conv":
        return
    m = site.module
    out = "; leave the layer out, or use the merged model"
    if any(d != 1 and k != 1 for d, k in zip(m.dilation, m.kernel_size, strict=True)):
        raise ValueError(f"layer '{site.name}' has dilation {tuple(m.dilation)}, which PEFT leaves out of its A{out}")
    if m.padding_mode != "zeros":
        raise ValueError(
            f"layer '{site.name}' has padding_mode '{m.padding_mode}', while PEFT's A pads with zeros{out}"
        )
    if dora and m.groups > 1:
        raise ValueError(f"layer '{site.name}' has {m.groups} groups, for which PEFT's DoRA has no definition{out}")


def shapes(site: Site, rank: int, dora: bool, as_parameter: bool = False) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer in a PEFT file, by the end of their key; `as_parameter`: its weight is one of target_parameters."""
    if as_parameter or not site.called:
        if dora:
            raise ValueError(
                f"layer '{site.name}' is a bare parameter, for which PEFT has no DoRA; leave it out, or use LoRA"
            )
        return peft_parameter.shapes(site, rank)
    ones: tuple[int, ...] = ()
    if site.kind == "conv":
        m = site.module
        ones = (1,) * len(m.kernel_size)
        if rank % m.groups:
            raise ValueError(f"layer '{site.name}' has {m.groups} groups, which rank {rank} is not divisible by")
        found = {
            "lora_A.weight": (rank, m.in_channels, *m.kernel_size),
            "lora_B.weight": (m.out_channels, rank // m.groups, *ones),
        }
    elif site.one_hot:
        found = {"lora_embedding_A": (rank, site.inputs), "lora_embedding_B": (site.outputs, rank)}
    else:
        found = {"lora_A.weight": (rank, site.inputs), "lora_B.weight": (site.outputs, rank)}
    if dora:
        found["lora_magnitude_vector"] = (1, site.outputs, *ones) if ones else (site.outputs,)
    return found


def from_peft(site: Site, tensors: dict[str, Tensor], as_parameter: bool = False) -> dict[str, Tensor]:
    """A, B (and m) of a layer from a file's tensors, whose shapes are checked."""
    A, B = (next(t for key, t in tensors.items() if key.startswith((f"lora_{x}", f"lora_embedding_{x}"))) for x in "AB")
    if as_parameter or not site.called:
        A, B = peft_parameter.from_peft(site, A, B)
    elif site.kind == "conv":
        m = site.module
        A, B = _blocks(site, A), B.reshape(*site.stack, site.outputs, A.shape[0] // m.groups)
    out = {"A": A, "B": B}
    if "lora_magnitude_vector" in tensors:
        out["m"] = tensors["lora_magnitude_vector"].reshape(site.outputs)
    dtype = torch.float64 if site.dtype == torch.float64 else torch.float32
    return {n: t.to(site.device, dtype).contiguous() for n, t in out.items()}


def to_peft(site: Site, A: Tensor, B: Tensor, m: Tensor | None) -> dict[str, Tensor]:
    """The tensors of a file from A, B (and m) of a layer."""
    wanted = shapes(site, file_rank(site, A), m is not None)
    if not site.called:
        A, B = peft_parameter.to_peft(site, A, B)
    elif site.stack:
        A = _spread(site, A)
    tensors = dict(zip(wanted, (A, B, *([] if m is None else [m])), strict=True))
    return {key: tensors[key].detach().cpu().reshape(shape).contiguous().clone() for key, shape in wanted.items()}


def file_rank(site: Site, A: Tensor) -> int:
    """The rank in PEFT's words: of all groups of a convolution together, of each entry of a bare parameter."""
    return A.shape[-2] * (math.prod(site.stack) if site.kind == "conv" else 1)


def _blocks(site: Site, A: Tensor) -> Tensor:
    """A (groups, r / groups, in / groups * kernel) from PEFT's (r, in, *kernel), which must be zero elsewhere."""
    groups = site.module.groups
    if groups == 1:
        return A.reshape(A.shape[0], -1)
    parts = A.reshape(groups, A.shape[0] // groups, groups, -1)
    own = torch.stack([parts[g, :, g] for g in range(groups)])
    if int(A.count_nonzero()) != int(own.count_nonzero()):
        raise ValueError(
            f"layer '{site.name}' has {groups} groups, and PEFT's adapter carries inputs of one group to the outputs of another, which no "
            "change of the layer's weight can; train it without this layer"
        )
    return own


def _spread(site: Site, A: Tensor) -> Tensor:
    groups, rank, columns = A.shape
    full = A.new_zeros(groups, rank, groups, columns)
    for g in range(groups):
        full[g, :, g] = A[g]
    return full
