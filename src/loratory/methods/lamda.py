"""LaMDA and LaMDA++: a trained square matrix above a frozen projection, and an upper projection that is frozen step by step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from loratory.methods.fields import Positive, PositiveInt, PositiveShare, Share
from loratory.methods.lora import scale
from loratory.methods.method import Declared, Footprint, Method, Run, frozen, new, trained
from loratory.methods.mos import types
from loratory.ops.allocation import ranks_by_score
from loratory.ops.spectral import leading, workspace
from loratory.sites.site import Site

BILLION = 10**9


@dataclass(frozen=True, kw_only=True)
class LaMDA(Method):
    """LaMDA: a trained square matrix above a frozen projection; the upper projection is trained, then frozen column by column.

        y = W x + s (B S - B0 S0) (A dropout(x))      A: (rank, in)   S: (rank, rank)   B: (out, rank)   s = alpha / rank
        W ~ U diag(D) V^T (the rank largest):   A = V^T,   B0 = U,   S0 = diag(D) / s
        step t of T:   min(rank, floor(rank t / (eta T))) columns of B are frozen, the one of the largest singular value first

    The model is unchanged at the start: the layer holds W - s B0 S0 A and s B S A beside it. A never moves, S is trained to the last
    step. Trains rank * rank + rank * out numbers a layer (rank * rank once B is frozen). Needs `loratory.drive(model, optimizer, steps=)`.
    LaMDA++: with candidates, ranks follow from the weights' spectra, and their mean is the rank. Layers are sorted by the share of
    |W|^2 between the smallest and the largest candidate, and cut into groups of nearly equal size, the first with the largest rank.
    Raises ValueError if rank < 1 or > min(in, out), alpha <= 0, dropout outside [0, 1), eta outside (0, 1], candidates do not increase, have
    another mean than rank or exceed a layer, or a run goes on under another schedule than it began with.
    Source: arXiv 2406.12832. Differs: the columns' order is the paper's and their pace, of which it states both ends, is linear (the released
    code: a rank-th of it, by gradients alone, so that moments and decay still move frozen columns: `schedule="released"`); W stays whole and
    B0 S0 is taken away in the adapter, so a quantised base keeps its codes; B keeps its place in the optimizer, without moments; the
    candidates' groups are ours. The released code starts as LoRA does, with a random S (`start="released"`, in float32).
    """

    rank: PositiveInt | None = None  # >= 1; None: 32, capped at min(in, out), or the mean of candidates
    alpha: Positive | None = None  # > 0; None: the scale s is 1
    dropout: Share = 0.0  # in [0, 1)
    eta: PositiveShare = 0.3  # in (0, 1]: share of the run after which B is frozen
    start: Literal["spectral", "released"] = "spectral"  # released: A and S Kaiming-uniform, B 0
    core_start: Literal["spectral", "zero"] = "spectral"  # zero: S0 = 0
    schedule: Literal["linear", "released"] = "linear"  # released: without the factor rank; frozen columns drift on
    candidates: tuple[int, ...] | None = None  # LaMDA++: ranks to choose from, for example (16, 24, 32, 40, 48)
    allocation: Literal["global", "type"] = "global"  # type: each projection type has its own budget

    default_rank = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start == "released" and self.core_start == "zero":
            raise ValueError(
                "core_start is 'zero' with start 'released', where B is 0 too, so nothing would ever learn; use start='spectral'"
            )
        if self.candidates is not None:
            object.__setattr__(self, "candidates", _checked(self.candidates, self.rank))

    def footprint(self, outputs: int, inputs: int) -> Footprint:
        rank = min(max(self.candidates) if self.candidates else self.rank or self.default_rank, outputs, inputs)
        return Footprint(
            rank + (2 * inputs if self.dropout else 0),
            kept=2 * rank * outputs,
            workspace=workspace(outputs, inputs, rank),
        )

    def per_site(self, sites: Mapping[str, Site]) -> dict[str, Method]:
        """LaMDA++: each layer's rank."""
        if self.candidates is None:
            return {}
        least, most = self.candidates[0], self.candidates[-1]
        scores = {}
        for name, site in sites.items():
            if most > (fits := min(site.outputs, site.inputs)):
                raise ValueError(
                    f"candidate rank {most} exceeds layer '{name}' (max {fits}); lower candidates, or leave the layer out with exclude="
                )
            scores[name] = _energy(site, least, most)
            site.measured[f"share of |W|^2 between ranks {least} and {most}"] = scores[name]
        groups = types(sites).values() if self.allocation == "type" else [list(sites.values())]
        ranks: dict[str, int] = {}
        for group in groups:
            names = [site.name for site in group]
            ranks |= zip(names, ranks_by_score([scores[name] for name in names], self.candidates), strict=True)
        return {name: replace(self, rank=ranks[name], candidates=None) for name in sites}

    def init(self, site: Site) -> dict[str, Declared]:
        rank = site.rank(self.rank, self.default_rank)
        A, B = new(site, *site.stack, rank, site.inputs), new(site, *site.stack, site.outputs, rank)
        S = new(site, *site.stack, rank, rank)
        tensors = {"A": frozen(A), "S": trained(S), "B": trained(B)}
        if self.start == "released":
            A.uniform_(-(site.inputs**-0.5), site.inputs**-0.5, generator=site.generator)
            S.uniform_(-(rank**-0.5), rank**-0.5, generator=site.generator)
            B.zero_()
        else:
            U, D, Vh, residual = leading(site.finite(), rank)
            A.copy_(Vh)
            B.copy_(U)
            S.zero_()
            site.measured["what the frozen projections leave out of W (Frobenius)"] = residual
            if self.core_start == "spectral":
                S.diagonal(dim1=-2, dim2=-1).copy_(D / scale(self.alpha, rank, False))
                tensors["BS0"] = frozen(B @ S)
        # columns of B without gradient; steps of the run and eta in billionths, once a step is done
        return tensors | {"progress": frozen(torch.zeros(3, dtype=torch.int64, device=site.device))}

    def factors(self, t: Any) -> tuple[Tensor, Tensor]:
        rank = t.A.shape[-2]
        learns = torch.arange(rank, device=t.B.device) >= t.progress[0]
        BS = torch.where(learns, t.B, t.B.detach()) @ t.S
        if self.start == self.core_start == "spectral":
            BS = BS - t.BS0
        s = scale(self.alpha, rank, False)
        return (BS if s == 1 else s * BS), t.A

    def frozen_columns(self, step: int, steps: int, rank: int) -> int:
        """How many columns of B are frozen in step 1, 2, ... of a run."""
        pace = rank if self.schedule == "linear" else 1
        return min(rank, pace * step * BILLION // (_billionths(self.eta) * steps))  # whole numbers: 0.55 * 100 is 55

    def before_step(self, run: Run) -> None:
        if run.steps is None:
            raise ValueError(f"LaMDA freezes B over the first {self.eta:g} of the run; give steps= to loratory.drive")
        known = run.kept.setdefault("columns", {})
        for name, t in run.layers.items():
            rank = t.A.shape[-2]
            was = known[name] if name in known else t.method._frozen_so_far(run, name, t)
            known[name] = columns = max(was, t.method.frozen_columns(run.step + 1, run.steps, rank))
            without_gradient = columns
            if t.method.schedule == "released" and was < rank == columns:
                without_gradient = 0  # in its last step the released code moves all of B
            elif columns == rank:
                run.rest(t.B)
                run.optimizer.state.pop(t.B, None)
            elif columns and t.method.schedule == "linear":
                run.hold(t.B, columns)
            t.progress[0] = without_gradient

    def after_step(self, run: Run) -> None:
        if "begun" not in run.kept:
            for t in run.layers.values():
                t.progress[1:] = torch.tensor([run.steps, _billionths(t.method.eta)])
            run.kept["begun"] = True

    def _frozen_so_far(self, run: Run, name: str, t: Any) -> int:
        """Columns that earlier steps have frozen. Raises ValueError where this is not the run that they belong to."""
        columns, steps, eta = t.progress.tolist()
        if not steps:  # no step is done
            return 0
        if run.reschedule:
            return columns
        way_out = "or reschedule=True, which leaves frozen columns frozen"
        if (steps, eta) != (run.steps, _billionths(self.eta)):
            raise ValueError(
                f"layer '{name}': LaMDA's run began with {steps} steps and eta {eta / BILLION:g}, and now has {run.steps} and {self.eta:g}; give "
                f"loratory.drive what it began with, {way_out}"
            )
        due = self.frozen_columns(run.step + 1, steps, t.A.shape[-2])
        if columns > due:
            raise ValueError(
                f"layer '{name}': {columns} columns of LaMDA's B are frozen, and step {run.step + 1} of {steps} has {due}; give "
                f"loratory.drive step=, the steps already done, {way_out}"
            )
        return columns


def _energy(site: Site, least: int, most: int) -> float:
    """Share of |W|^2 in the singular values after the first `least` and up to `most`."""
    if site.device.type == "meta":
        return 0.0
    _, s, _, residual = leading(site.finite(), most)
    square = s.double().square()
    held = float(square.sum())
    return (1 - residual**2) * float(square[..., least:].sum()) / held if held else 0.0


def _billionths(eta: float) -> int:
    return round(eta * BILLION)


def _checked(candidates: Any, rank: int | None) -> tuple[int, ...]:
    if isinstance(candidates, str) or not isinstance(candidates, Sequence):
        raise TypeError(f"candidates is {candidates!r}; it must be a list of ranks, for example (16, 24, 32, 40, 48)")
    ranks = tuple(candidates)
    if any(isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 for rank in ranks):
        raise ValueError(f"candidates is {ranks}; each must be a positive integer")
    if len(ranks) < 2 or any(a >= b for a, b in pairwise(ranks)):
        raise ValueError(f"candidates is {ranks}; it must hold at least two ranks, each larger than the one before")
    if rank is not None and sum(ranks) != rank * len(ranks):
        raise ValueError(
            f"candidates is {ranks} with mean {sum(ranks) / len(ranks):g}; their mean must be the target rank ({rank})"
        )
    return ranks
