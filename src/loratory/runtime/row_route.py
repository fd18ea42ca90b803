"""How an adapted layer serves rows of several adapters in one call.

Each layer's path is chosen on entry. Rows whose adapter states rung 1 share one batched product: their factors are stacked, ranks
padded with zeros, and gathered by row. Rows of the other rungs are taken adapter by adapter. A row without an adapter passes
through the base alone, so no adapter can touch it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from loratory.methods.method import two_factors
from loratory.runtime.layer import Adapter, Layer
from loratory.runtime.route import OUTPUTS

_MAIN = ("input_ids", "inputs_embeds", "decoder_input_ids", "input_features", "input_values", "pixel_values")


class LostRows(ValueError):
    """A layer's input does not show which row is whose."""

    def __init__(self, layer: str, message: str) -> None:
        super().__init__(message)
        self.layer = layer


class Places(NamedTuple):
    """Where the rows of a batch go in one layer."""

    rest: Tensor | None  # rows that need the base's output; None: all
    low: Tensor | None  # of these, the ones with factors; None: all
    which: Tensor  # their adapters, by number
    drops: list[tuple[float, Tensor]]  # dropout -> the rows among them that have it
    groups: list[Tensor]  # rows of each other adapter
    back: Tensor | None  # from the order rest, groups to the batch's; None: it is the same


class Batch:
    """The rows of one `rows` block, or of a group of them. `copies`: sequences that `generate` runs for each row (beams,
    num_return_sequences). `dim`: where the model's inputs hold the rows."""

    def __init__(self, names: Sequence[str | None], dim: int = 0) -> None:
        self.names = tuple(names)
        self.size = len(names)
        self.dim = dim
        self.copies = 1
        self.expected: int | None = None  # inside generate: what it will expand each row to
        self.places: dict[Any, Places] = {}  # layers with the same adapters share them

    @property
    def alike(self) -> bool:
        """Whether all rows have the same adapter, or none."""
        return len(set(self.names)) == 1

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the batch of a call of the whole model."""
        found = batch_size(args, kwargs, self.dim)
        copies = self.expected or 1
        if found not in (None, self.size * copies):
            raise ValueError(
                f"the batch has {found} rows, but rows() names {self.size} adapters; give one name (or None) for each row"
                + (f", not for each of the {copies} sequences that generate makes of it" if copies > 1 else "")
            )
        self.copies = copies

    def fit(self, layer: str, x: Tensor) -> Tensor:
        """A layer's input with one entry for each row: a single one, shared by all rows, is repeated."""
        count = x.shape[0] if x.dim() else 0
        if count in (self.size, self.size * self.copies):
            return x
        if count == 1 and x.dim() > 1:
            return x.expand(self.size * self.copies, *x.shape[1:])
        raise LostRows(
            layer,
            f"layer '{layer}' gets an input of shape {tuple(x.shape)}, whose first dimension is not the batch of {self.size} rows, so its "
            "rows cannot be told apart; call the whole model, which then runs these rows group by group",
        )


class RowRoute:
    """A layer's path: each row takes its own adapter."""

    def __init__(self, batch: Batch, chosen: list[Adapter | None]) -> None:
        self.batch = batch
        distinct = list({id(t): t for t in chosen if t is not None}.values())
        self.low = [t for t in distinct if t.method.rung == 1]
        self.others = [t for t in distinct if t.method.rung != 1]
        numbers = {id(t): i for i, t in enumerate([*self.low, *self.others])}
        self.numbers = tuple(-1 if t is None else numbers[id(t)] for t in chosen)
        self.rates = tuple(t.method.input_dropout for t in self.low)
        self._stacked: tuple[Any, Tensor, Tensor] | None = None

    def __call__(self, layer: Layer, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = self.batch.fit(layer.site.name, x)
        at = self.places(x.shape[0] // self.batch.size, x.device)
        parts = []
        if at.rest is None or len(at.rest):
            u = x if at.rest is None else x.index_select(0, at.rest)
            parts.append(self._low_rank(layer, base(u), u, at))
        for t, group in zip(self.others, at.groups, strict=True):
            parts.append(OUTPUTS[t.method.rung](layer.site, t, base, x.index_select(0, group)))
        return parts[0] if at.back is None else torch.cat(parts).index_select(0, at.back)

    def _low_rank(self, layer: Layer, y: Tensor, x: Tensor, at: Places) -> Tensor:
        if not len(at.which):
            return y
        u = x if at.low is None else x.index_select(0, at.low)
        if layer.training:
            for p, dropped in at.drops:
                u = u.index_copy(0, dropped, layer.site.drop(u.index_select(0, dropped), p, True))
        A, B = self.stacked(layer.site.compute_dtype(x))
        update = layer.site.low_rank_rows(u, A, B, at.which).to(y.dtype)
        return y + update if at.low is None else y.index_add(0, at.low, update)

    def stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The factors of all adapters of rung 1, (adapters, *stack, rank, in) and (adapters, *stack, out, rank).

        Without gradients they are kept from call to call, as long as no tensor they come from is written to.
        """
        state = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else _written(self.low, dtype)
        if state is not None and self._stacked is not None and self._stacked[0] == state:
            return self._stacked[1], self._stacked[2]
        factors = [two_factors(t.method.factors(t)) for t in self.low]
        rank = max(A.shape[-2] for _, A in factors)
        A = torch.stack([F.pad(A, (0, 0, 0, rank - A.shape[-2])) for _, A in factors]).to(dtype)
        B = torch.stack([F.pad(B, (0, rank - B.shape[-1])) for B, _ in factors]).to(dtype)
        self._stacked = None if state is None else (state, A, B)
        return A, B

    def places(self, copies: int, device: torch.device) -> Places:
        """Where the rows go, when each stands for several sequences; made once."""
        known = self.batch.places
        key = (copies, device, self.numbers, self.rates, len(self.others))
        if key not in known:
            known[key] = _places(self, copies, device)
        return known[key]


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any], dim: int = 0) -> int | None:
    """The number of rows in a call's main input."""
    inputs = [*args, *(kwargs.get(name) for name in _MAIN), *kwargs.values()]
    return next((v.shape[dim] for v in inputs if isinstance(v, Tensor) and v.dim() > dim), None)


def _places(route: RowRoute, copies: int, device: torch.device) -> Places:
    numbers = [n for n in route.numbers for _ in range(copies)]
    rest = [i for i, n in enumerate(numbers) if n < len(route.low)]
    low = [j for j, i in enumerate(rest) if numbers[i] >= 0]
    which = [numbers[rest[j]] for j in low]
    drops = [(p, [k for k, n in enumerate(which) if route.rates[n] == p]) for p in sorted({*route.rates} - {0.0})]
    groups = [[i for i, n in enumerate(numbers) if n == len(route.low) + g] for g in range(len(route.others))]
    order = [*rest, *(i for group in groups for i in group)]
    back = sorted(range(len(order)), key=order.__getitem__)

    def index(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Places(
        index(rest) if groups else None,
        None if len(low) == len(rest) else index(low),
        index(which),
        [(p, index(at)) for p, at in drops],
        [index(group) for group in groups],
        index(back) if groups else None,
    )


def _written(adapters: list[Adapter], dtype: torch.dtype) -> Any:
    """What changes when a tensor of these adapters does; None where that cannot be seen."""
    tensors = [t for adapter in adapters for t in adapter.every_tensor().values()]
    if any(t.is_inference() for t in tensors):
        return None
    return dtype, [(t.data_ptr(), t._version) for t in tensors]
