"""TLoRA: a full-rank transform of the layer's input in tensor-ring form, and a tiny residual."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from loratory.methods.fields import NotNegative, Positive, PositiveInt
from loratory.methods.method import Declared, Footprint, Method, new, trained
from loratory.ops.made_again import product
from loratory.ops.tensor_ring import balanced, ring_change, ring_identity, ring_rows
from loratory.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class TLoRA(Method):
    """TLoRA: a full-rank transform of the layer's input in tensor-ring form, and a tiny residual.

        y = W (T x) + scale D x,   W' = W T + scale D,   in = in_1 ... in_n, out = out_1 ... out_n (first index slowest), n: dimensions
        T[i, j] = trace(A1[i_1, j_1] ... An[i_n, j_n])                          Ad: (in_d, in_d, transform_rank, transform_rank)
        D[o, i] = trace(B1[o_1] ... Bn[o_n] C1[i_1] ... Cn[i_n])                Bd: (out_d, rank, rank)   Cd: (in_d, rank, rank)
        residual="lora": D = B A                                                B: (out, rank)   A: (rank, in)
        penalty = identity_reg sum |Ad[:, :, r, s] - I / transform_rank|^2 + orthogonal_reg |T^T T - I|^2   (`loratory.penalty`)

    T starts at I and D at 0 (B1 or B is 0), so the model is unchanged. start="paper" gives a core the same matrix for every r, s; their
    gradients are then equal, and T stays a Kronecker product until rounding parts them; start="gauge" parts them from the first step.
    Trains transform_rank^2 sum in_d^2 + rank^2 sum (in_d + out_d) numbers a layer (rank * (in + out) for the residual "lora"); the cores
    of T have no weight decay, which would pull T to 0. The update has full rank, the ring's D at most rank^2.
    Raises ValueError if a rank < 1, factors do not multiply to the layer's size, in has no factors that make T smaller than a matrix, or
    the layer is an embedding or a convolution with a kernel of more than one place.
    Source: arXiv 2501.08727 section 3. Differs: start="gauge" and scale are ours; the deviation of the ring's cores is 1 / sqrt(rank).
    """

    rank: PositiveInt | None = None  # >= 1: of the residual; None: 6 for "ring", 4 for "lora", capped at min(in, out)
    transform_rank: PositiveInt = 2  # >= 1: ring rank of T
    residual: Literal["ring", "lora"] = "ring"
    dimensions: PositiveInt = 3  # >= 1: factors of each side
    in_factors: tuple[int, ...] | None = None  # None: as equal as possible
    out_factors: tuple[int, ...] | None = None
    start: Literal["paper", "gauge"] = "paper"
    scale: Positive = 1.0  # > 0: of the residual
    identity_reg: NotNegative = 0.0  # >= 0
    orthogonal_reg: NotNegative = 0.0  # >= 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("in_factors", "out_factors"):
            given = getattr(self, name)
            if given is None:
                continue
            given = tuple(given)
            if len(given) != self.dimensions or not all(isinstance(f, int) and f >= 1 for f in given):
                raise ValueError(
                    f"{name} is {given}; it must hold {self.dimensions} positive integers, one for each of dimensions"
                )
            object.__setattr__(self, name, given)

    def init(self, site: Site) -> dict[str, Declared]:
        if site.one_hot or (site.kind == "conv" and math.prod(site.module.kernel_size) > 1):
            kind = "an embedding" if site.one_hot else "a convolution with a kernel of more than one place"
            raise ValueError(
                f"layer '{site.name}' is {kind}, and TLoRA is defined for linear layers alone; leave it out with exclude="
            )
        ins = self._sizes(site, "in", site.inputs, self.in_factors)
        if self.in_factors is None and self.dimensions > 1 and sum(f * f for f in ins) >= site.inputs**2:
            raise ValueError(
                f"layer '{site.name}' has {site.inputs} inputs, which do not factor (best: {ins}), so TLoRA's transform would be no "
                "smaller than a matrix; give in_factors=, or leave the layer out with exclude="
            )
        drawn = self.start == "gauge" and site.device.type != "meta"
        cores = ring_identity(ins, self.transform_rank, new(site, 0), site.generator if drawn else None)
        stacked = [core.expand(*site.stack, *core.shape).contiguous() for core in cores]
        tensors = {f"A{d}": trained(core, decay=False) for d, core in enumerate(stacked, 1)}
        rank = site.rank(self.rank, default=6 if self.residual == "ring" else 4)
        if self.residual == "lora":
            bound = site.inputs**-0.5
            A = new(site, *site.stack, rank, site.inputs).uniform_(-bound, bound, generator=site.generator)
            return tensors | {"B": trained(new(site, *site.stack, site.outputs, rank).zero_()), "A": trained(A)}
        outs = self._sizes(site, "out", site.outputs, self.out_factors)
        for letter, sizes in (("B", outs), ("C", ins)):
            for d, size in enumerate(sizes, 1):
                core = new(site, *site.stack, size, rank, rank)
                first = letter == "B" and d == 1
                core = core.zero_() if first else core.normal_(std=rank**-0.5, generator=site.generator)
                tensors[f"{letter}{d}"] = trained(core)
        return tensors

    def _sizes(self, site: Site, side: str, size: int, given: tuple[int, ...] | None) -> tuple[int, ...]:
        if given is None:
            return balanced(size, self.dimensions)
        if math.prod(given) != size:
            raise ValueError(
                f"layer '{site.name}': {side}_factors {given} multiply to {math.prod(given)}, but it has {size} {side}puts; give it others "
                "with per_layer=, or leave the layer out with exclude="
            )
        return given

    def footprint(self, outputs: int, inputs: int) -> Footprint:
        rank = self.rank or (6 if self.residual == "ring" else 4)
        width = rank * rank if self.residual == "ring" else rank
        return Footprint(2 * inputs + width, kept=width * (outputs + inputs), scratch=4 * inputs**2)

    def change(self, t: Any) -> Tensor:
        """T - I (*stack, in, in)."""
        return ring_change(self._cores(t, "A"))

    def _cores(self, t: Any, letter: str) -> list[Tensor]:
        return [getattr(t, f"{letter}{d}") for d in range(1, self.dimensions + 1)]

    def low_rank(self, t: Any) -> tuple[Tensor, Tensor]:
        """B (*stack, out, k) and A (*stack, k, in) with scale D = B A."""
        if self.residual == "lora":
            return self.scale * t.B, t.A
        P, Q = (ring_rows(self._cores(t, letter)) for letter in "BC")
        return self.scale * P.flatten(-2), Q.mT.flatten(-2).mT

    def weight(self, t: Any, W: Tensor) -> Tensor:
        change = self.change(t)
        B, A = self.low_rank(t)
        return W + (W.to(change.dtype) @ change + B @ A).to(W.dtype)

    def forward(self, t: Any, x: Tensor, base: Callable[[Tensor], Tensor], site: Site) -> Tensor:
        if site.kind == "conv":  # of one place, where W' is cheap
            return site.with_bias(site.apply(x, self.weight(t, site.read())))
        dtype = site.compute_dtype(x)

        change, cores = self.change(t), self._cores(t, "A")
        wide = x.to(change.dtype)  # T - I is small beside I: the sum is rounded once
        u = (wide + product(wide, change, lambda: ring_change(cores), cores)).to(dtype)  # T - I is not kept
        B, A = self.low_rank(t)
        return base(u) + site.up(site.down(x, A.to(dtype)), B.to(dtype))

    def penalty(self, t: Any) -> Tensor | None:
        total = None
        if self.identity_reg:
            terms = []
            for core in self._cores(t, "A"):
                eye = torch.eye(core.shape[-3], device=core.device, dtype=core.dtype) / self.transform_rank
                terms.append((core - eye[:, :, None, None]).square().sum())
            total = self.identity_reg * torch.stack(terms).sum()
        if self.orthogonal_reg:
            E = self.change(t)
            far = self.orthogonal_reg * (E + E.mT + E.mT @ E).square().sum()  # T^T T - I
            total = far if total is None else total + far
        return total
