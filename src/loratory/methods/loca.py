"""LoCA: few entries of the update's cosine spectrum, and where they lie, are trained by turns."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from loratory.methods.fields import Count, Positive, PositiveInt, Share
from loratory.methods.method import Declared, Footprint, Method, Run, check_linear, frozen, new, trained
from loratory.ops.dct import cosine_delta, cosine_product
from loratory.ops.recomputed_delta import Delta, with_delta
from loratory.sites.site import Site

COEFFICIENT_STEPS, LOCATION_STEPS = 10, 20  # of each cycle


@dataclass(frozen=True, kw_only=True)
class LoCA(Method):
    """LoCA: a few trained entries of the update's cosine spectrum, at trained places.

        W' = W + scale C_M^T S C_N,   S = sum_p a_p at (row_p, col_p),   M = out, N = in
        row = round(clamp(u_1, 0, 0.999) (M - 1)),   col = round(clamp(u_2, 0, 0.999) (N - 1));   a: (k)   u: (2, k)

    a starts at 0 and u uniform, so the model is unchanged. Until location_steps, a cycle trains a for 10 optimizer steps and u for 20;
    then u rests for good. A location's gradient is a central difference in the spectrum of W's gradient. Trains 3 n_frequency numbers a
    layer (n_frequency once the locations rest); u has no weight decay. Needs `loratory.drive(model, optimizer, steps=)`.
    Raises ValueError if n_frequency < 1 or > out * in, scale is 0, dropout outside [0, 1), or a layer is not linear.
    Source: arXiv 2502.06820 eq. 8 to 12. Differs: the schedule counts optimizer steps, not forward passes; the transform is a product with a
    kept matrix, and not an FFT (the authors' third mode, which gives the same values).
    """

    n_frequency: PositiveInt | None = None  # >= 1: entries of the spectrum, k; None: 1000, capped at out * in
    scale: float = 1.0  # not 0
    dropout: Share = 0.0  # in [0, 1)
    location_steps: Count | None = None  # >= 0: steps in which locations are trained by turns; None: a tenth of the run
    location_lr_ratio: Positive = 0.02  # > 0: learning rate of locations over that of coefficients (1e-4 over 5e-3)
    dct_mode: Literal["auto", "dense", "sparse"] = (
        "auto"  # dense: through the update; sparse: around it; the same values
    )
    cache_delta: bool = False  # dense: keep the update for the backward pass instead of making it again

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"scale is {self.scale}; it must be finite and not 0")

    def planned(self, *, learning_rate: float, warmup: float, steps: int) -> "LoCA":
        return self if self.location_steps is not None else replace(self, location_steps=round(0.1 * steps))

    def footprint(self, outputs: int, inputs: int) -> Footprint:
        matrix, k = outputs * inputs, min(self.n_frequency or 1000, outputs * inputs)
        kept = 2 * matrix if self.cache_delta and self.dct_mode == "dense" else 0
        cosines = outputs**2 + inputs**2  # kept for all layers of this size
        return Footprint(2 * inputs if self.dropout else 0, kept, 3 * matrix + 3 * k * (outputs + inputs) + cosines)

    def init(self, site: Site) -> dict[str, Declared]:
        check_linear(self, site)
        entries = site.outputs * site.inputs
        k = min(1000, entries) if self.n_frequency is None else self.n_frequency
        if k > entries:
            raise ValueError(
                f"layer '{site.name}': n_frequency ({k}) exceeds the {entries} entries of this weight; lower n_frequency, or leave the "
                "layer out with exclude="
            )
        a, u = new(site, *site.stack, k).zero_(), new(site, *site.stack, 2, k).uniform_(generator=site.generator)
        phase = new(site, 2).fill_(1.0)  # whether a and u are trained in this step
        return {"a": trained(a), "u": trained(u, decay=False, lr=self.location_lr_ratio), "phase": frozen(phase)}

    def delta(self, t: Any) -> Tensor:
        return self._update(t)([t.a, t.u])

    def _update(self, t: Any) -> Delta:
        def update(tensors: Sequence[Tensor]) -> Tensor:
            return self.scale * cosine_delta(*self._entries(t, *tensors), *t.shape[-2:])

        return update

    def _entries(self, t: Any, a: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients, and locations in index units; the resting one with a gradient of zero."""
        ends = [side - 1 for side in t.shape[-2:]]
        u = _weighed(u, t.phase[1]).clamp(0, 0.999)
        return _weighed(a, t.phase[0]), torch.stack([u[..., i, :] * end for i, end in enumerate(ends)], -2)

    def forward(self, t: Any, x: Tensor, base: Callable[[Tensor], Tensor], site: Site) -> Tensor:
        u = site.drop(x, self.dropout, True) if self.dropout and t.training else x
        M, N = t.shape
        tokens = x.numel() // N
        if self.dct_mode == "sparse" or (self.dct_mode == "auto" and tokens * t.a.shape[-1] < M * N):
            a, location = self._entries(t, t.a, t.u)
            dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
            return base(x) + self.scale * cosine_product(u.to(dtype), a, location, M, N)
        return with_delta(x, u, base, site, self._update(t), [t.a, t.u], keep=self.cache_delta)

    def before_step(self, run: Run) -> None:
        last = self.location_steps
        if last is None:
            if run.steps is None:
                raise ValueError(
                    "LoCA's locations rest after a tenth of the run; give location_steps=, or steps= to loratory.drive"
                )
            last = round(0.1 * run.steps)
        if run.step == 0 and run.steps is not None and last > run.steps:
            warnings.warn(
                f"LoCA's location phase ({last} steps) is longer than the training ({run.steps})", stacklevel=2
            )
        places = run.step < last and run.step % (COEFFICIENT_STEPS + LOCATION_STEPS) >= COEFFICIENT_STEPS
        for t in run.layers.values():
            t.phase.copy_(torch.tensor([float(not places), float(places)]))
            run.rest(t.a if places else t.u)


def _weighed(p: Tensor, share: Tensor) -> Tensor:
    """p itself, with so much of its gradient."""
    return p.detach() + share.detach() * (p - p.detach())
