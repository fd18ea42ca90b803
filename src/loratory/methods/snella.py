"""SNELLA: a sparse update cut from a kernel matrix, whose layers compete for the entries they keep."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from loratory.methods.fields import Count, InnerShare, NotNegative, PositiveInt, Share
from loratory.methods.method import Declared, Footprint, Method, Run, check_linear, frozen, new, trained
from loratory.ops.allocation import entries_by_score
from loratory.ops.kernel_matrix import LEAST, Rule, at_start, kernel_delta, kernel_matrix, size_quantile
from loratory.ops.recomputed_delta import Delta, with_delta
from loratory.sites.site import Site

EPOCHS = 100  # of the paper's runs: where an epoch's length is not known, it is this part of the run


@dataclass(frozen=True, kw_only=True)
class SNELLA(Method):
    """SNELLA: a sparse update cut from a kernel matrix, whose layers compete for the entries they keep.

        y = W x + droppath(D dropout(x)),   D[o, i] = K |K| where |K[i, o]| > tau, else 0;   tau: the s-quantile of |K|
        K = k + alpha softmax_o(k / gamma) + beta,   k[i, o] = 0.1 |P_1[i] - Q_1[o]| - 0.1 |P_2[i] - Q_2[o]|
        P: (2, in, rank / 2)   Q: (2, out, rank / 2)   alpha, gamma, beta, s: (1);  |K| as a factor is a constant for the gradient

    s starts at `sparsity` everywhere; each epoch the entries that all layers may keep, (1 - s) in * out, fall along a cubic towards
    `target` and are shared out in proportion to a layer's mean of I U, running means of |p grad p| of P and Q and of its swings.
    P, Q start uniform within 1/sqrt(in rank / 2) and 1/sqrt(out rank / 2), alpha, gamma at 1, beta at 0: D is small, so the model is
    almost unchanged (about 1e-4 on a wide layer); zero_start subtracts D's start. Trains rank (in + out) + 3 numbers a layer, rank
    (in + out) with kernel "distance" or "linear". Needs `loratory.drive(model, optimizer, steps=, epoch_steps=)` and Adam: gradients
    carry |K|. Without sparsify D = K. A layer that keeps nothing gets no gradient; least_kept prevents it.
    Raises ValueError if rank is odd, sparsity or target outside [0, 1), the warm-ups leave no epoch, or a layer is not linear.
    Source: arXiv 2510.24037; kernels of 2411.01800. Differs: the released K |K| stands (threshold="soft" gives K max(|K| - tau, 0));
    zero_start and least_kept are ours; shares are whole numbers; a target by default, which the paper sets by data set.
    """

    rank: PositiveInt = 8  # even: numbers of a point in both heads; the paper's runs use 32
    kernel: Literal["mix", "distance", "linear"] = "mix"  # distance: K = k; linear: K = P Q^T in one head
    norm: Literal[1, 2] = 2  # of distances
    sparsify: bool = True
    threshold: Literal["hard", "soft"] = "hard"
    sparsity: Share = 0.0  # in [0, 1): share of zeros at the start
    target: Share | None = 0.5  # in [0, 1): zeros at the end (the paper: 0.16 to 0.93); None: s stays
    interval: PositiveInt = 1  # >= 1: epochs between two allocations
    warmup_initial: Count = 0  # >= 0: epochs at `sparsity`
    warmup_final: Count = 0  # >= 0: epochs at `target`
    importance: Literal["gradient", "magnitude"] = "gradient"  # magnitude: |p| in place of |p grad p|
    importance_beta: InnerShare = 0.85  # in (0, 1): running mean of the importance
    uncertainty_beta: InnerShare = 0.85  # in (0, 1): of its swings
    least_kept: NotNegative = 0.0  # in [0, 1 - target]: share of its entries that every layer keeps
    zero_start: bool = False
    dropout: Share = 0.0  # in [0, 1); the paper's runs: 0.1
    drop_path: Share = 0.0  # in [0, 1): whole samples without the update; the paper's runs: 0.1
    cache_delta: bool = False  # keep the update for the backward pass instead of making it again

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel != "linear" and self.rank % 2:
            raise ValueError(f"rank is {self.rank}; it must be divisible by the 2 kernel heads")
        most = 1 - max(self.sparsity, self.target or 0)
        if self.least_kept > most:
            raise ValueError(f"least_kept is {self.least_kept}; it must lie in [0, {most:g}], what the sparsity leaves")
        if self.acts_in_training and self.target is not None and self.target < self.sparsity:
            warnings.warn(
                f"SNELLA's target ({self.target}) is below its sparsity ({self.sparsity}): the update becomes denser in training",
                stacklevel=3,
            )

    @property
    def acts_in_training(self) -> bool:
        return self.sparsify and self.target is not None

    @property
    def rule(self) -> Rule:
        return Rule(self.kernel, self.norm, self.threshold if self.sparsify else "none")

    def footprint(self, outputs: int, inputs: int) -> Footprint:
        matrix, points = outputs * inputs, self.rank * (outputs + inputs)
        dropped = (2 * inputs if self.dropout else 0) + (inputs if self.drop_path else 0)
        importance = 2 * points if self.acts_in_training else 0
        return Footprint(dropped, importance + (2 * matrix if self.cache_delta else 0), 2 * matrix + 6 * LEAST)

    def kept_in_optimizer(self, t: Any) -> int:
        return 2 * (t.P.numel() + t.Q.numel()) if self.acts_in_training else 0

    def init(self, site: Site) -> dict[str, Declared]:
        check_linear(self, site)
        if self.drop_path and not site.called:
            raise ValueError(
                f"layer '{site.name}' is a bare parameter, whose update cannot be dropped by sample; set drop_path=0 for it with per_layer=, "
                "or leave the layer out with exclude="
            )
        heads = 1 if self.kernel == "linear" else 2
        width = self.rank // heads
        P, Q = (new(site, *site.stack, heads, side, width) for side in (site.inputs, site.outputs))
        for points in (P, Q):
            bound = 1 / math.sqrt(points.shape[-2] * width)
            points.uniform_(-bound, bound, generator=site.generator)
        c = new(site, heads).fill_(0.1)
        c[1:].neg_()
        tensors = {"P": trained(P), "Q": trained(Q), "c": frozen(c)}
        s = new(site, *site.stack, 1).fill_(self.sparsity)
        if self.kernel == "mix":
            mixing = at_start([torch.empty_like(s) for _ in range(3)])
            tensors |= {n: trained(m, decay=False) for n, m in zip(("alpha", "gamma", "beta"), mixing, strict=True)}
        if self.sparsify:
            tensors["sparsity"] = frozen(s)
        if self.zero_start:
            tensors |= {"P0": frozen(P.clone()), "Q0": frozen(Q.clone())}
            if self.sparsify:
                mixing = [tensors[n].tensor for n in ("alpha", "gamma", "beta")] if self.kernel == "mix" else []
                K = kernel_matrix(P, Q, c, mixing, self.rule)
                tensors["tau0"] = frozen(size_quantile(K, s))
        return tensors

    def delta(self, t: Any) -> Tensor:
        return self._update(t)(self._tensors(t))

    def figures(self, t: Any) -> dict[str, float]:
        return {"share of the update's entries at 0": float(t.sparsity.mean())} if self.sparsify else {}

    def _tensors(self, t: Any) -> list[Tensor]:
        return [t.P, t.Q, t.alpha, t.gamma, t.beta] if self.kernel == "mix" else [t.P, t.Q]

    def _update(self, t: Any) -> Delta:
        start = (t.P0, t.Q0, t.tau0 if self.sparsify else None) if self.zero_start else None
        return kernel_delta(t.c, t.sparsity if self.sparsify else t.c, self.rule, start)

    def forward(self, t: Any, x: Tensor, base: Callable[[Tensor], Tensor], site: Site) -> Tensor:
        u = x
        if t.training and self.dropout:
            u = site.drop(u, self.dropout, True)
        if t.training and self.drop_path:
            samples = (u.shape[0], *(1,) * (u.dim() - 1)) if u.dim() > 1 else (1,)
            u = u * F.dropout(u.new_ones(samples), self.drop_path, True)  # D is linear: as well before it as behind
        return with_delta(x, u, base, site, self._update(t), self._tensors(t), keep=self.cache_delta)

    def after_step(self, run: Run) -> None:
        for t in run.layers.values():
            for p in (t.P, t.Q):
                if p.grad is None:
                    continue
                seen = (p if self.importance == "magnitude" else p * p.grad).abs()
                seen = torch.where(seen.isnan(), torch.zeros_like(seen), seen)
                state = run.optimizer.state[p]  # beside the moments: in a checkpoint, and not in the adapter's file
                if "importance" not in state:
                    state |= {"importance": torch.zeros_like(p), "uncertainty": torch.zeros_like(p)}
                mean, swing = state["importance"], state["uncertainty"]
                mean.mul_(self.importance_beta).add_(seen, alpha=1 - self.importance_beta)
                swing.mul_(self.uncertainty_beta).add_((seen - mean).abs(), alpha=1 - self.uncertainty_beta)

    def before_step(self, run: Run) -> None:
        if run.steps is None:
            raise ValueError("SNELLA's sparsity follows the length of the run; give steps= to loratory.drive")
        length = run.epoch_steps or max(1, run.steps // EPOCHS)
        epochs = math.ceil(run.steps / length)
        if self.warmup_initial + self.warmup_final >= epochs:
            raise ValueError(
                f"warmup_initial ({self.warmup_initial}) and warmup_final ({self.warmup_final}) leave no epochs for the schedule of a run "
                f"of {epochs}; lower them, or train longer"
            )
        if run.step >= run.steps or run.step % length:
            return
        layers = list(run.layers.values())
        entries = [math.prod(t.shape[-2:]) for t in layers for _ in range(t.sparsity.numel())]
        volume, shared_out = self.volume(run.step // length, epochs, entries)
        if not shared_out:
            return
        kept = entries_by_score(int(volume), self.scores(run), entries, self.least_kept)
        zeros = iter([min(max(1 - n / cap, 0.0), 1.0) for n, cap in zip(kept, entries, strict=True)])
        for t in layers:
            own = [next(zeros) for _ in range(t.sparsity.numel())]
            t.sparsity.copy_(torch.tensor(own, dtype=t.sparsity.dtype).reshape(t.sparsity.shape))

    def volume(self, epoch: int, epochs: int, entries: Sequence[int]) -> tuple[float, bool]:
        """The entries that all matrices together may keep in this epoch, and whether they are shared out anew."""
        first, last = (sum((1 - (s or 0)) * cap for cap in entries) for s in (self.sparsity, self.target))
        if epoch <= self.warmup_initial:
            return first, False
        if epoch > epochs - self.warmup_final:
            return last, True
        gone = (epoch - self.warmup_initial) / (epochs - self.warmup_final - self.warmup_initial)
        return int(last + (first - last) * (1 - gone) ** 3), epoch % self.interval == 0

    def scores(self, run: Run) -> list[float]:
        """The share of each matrix in the importance, in the order of the layers and, inside a stack, of its entries."""
        found, known = [], False
        for t in run.layers.values():
            score = torch.zeros_like(t.sparsity).flatten()
            for p in (t.P, t.Q):
                state = run.optimizer.state.get(p, {})
                if "importance" in state:
                    known = True
                    score += (state["importance"] * state["uncertainty"]).flatten(-3).mean(-1).flatten()
            found.append(score)
        if not known:
            raise RuntimeError(
                "SNELLA shares out sparsity by the importance it has seen, and it has seen no step of this optimizer; call loratory.drive "
                "with step=0, or put the optimizer's state back first"
            )
        scores = torch.cat(found).tolist()
        total = sum(scores)
        return [score / total for score in scores] if total > 0 else [1 / len(scores)] * len(scores)
