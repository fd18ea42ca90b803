"""One adapter for each row of a batch.

Each layer's path is chosen on entry. Rows whose adapter states rung 1 share one batched product: their factors are stacked, ranks
padded with zeros, and gathered by row. Rows of the other rungs are taken adapter by adapter. A row without an adapter passes
through the base alone, so no adapter can touch it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loratory.methods.method import two_factors
from loratory.runtime.layer import BASE, LAYER, Adapter, Copies, Copy, Layer, copies_of, is_swapped, layers_of
from loratory.runtime.route import delta_output, route_layer, swap_copies, weight_output
from loratory.runtime.state import require_adapter, state_of, unwrap

_ROW_BY_ROW = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.modules.conv._ConvNd)
_MAIN = ("input_ids", "inputs_embeds", "decoder_input_ids", "input_features", "input_values", "pixel_values")


class Places(NamedTuple):
    """Where the rows of a batch go in one layer."""

    rest: Tensor | None  # rows that need the base's output; None: all
    low: Tensor | None  # of these, the ones with factors; None: all
    which: Tensor  # their adapters, by number
    drops: list[tuple[float, Tensor]]  # dropout -> the rows among them that have it
    groups: list[Tensor]  # rows of each other adapter
    back: Tensor | None  # from the order rest, groups to the batch's; None: it is the same


class Batch:
    """The rows of one `rows` block. `copies`: sequences that `generate` runs for each row (beams, num_return_sequences)."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self.size = len(names)
        self.copies = 1
        self.expected: int | None = None  # inside generate: what it will expand each row to
        self.places: dict[Any, Places] = {}  # layers with the same adapters share them

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the batch of a call of the whole model."""
        found = _batch_size(args, kwargs)
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
        raise ValueError(
            f"layer '{layer}' gets an input of shape {tuple(x.shape)}, whose first dimension is not the batch of {self.size} rows, so its "
            "rows cannot be told apart; run these rows one adapter after the other, or train the adapters without this layer (exclude=)"
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
            u = x.index_select(0, group)
            if t.method.rung == 4:
                parts.append(t.method.forward(t, u, base, layer.site))
            else:
                parts.append((delta_output if t.method.rung == 2 else weight_output)(layer.site, t, u))
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


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Inside this block row i of every batch is served by the adapter names[i]; None: by the base alone.

    Any mix of methods. Forward, training (gradients reach each adapter from its own rows) and `generate`, where the beams and
    sequences of a row keep its adapter. The batch must be the first dimension of every adapted layer's input; an input shared by
    all rows (position ids) is repeated. Blocks may be nested; `disabled` works inside.
    Modules trained in full (also_train, bias, Full) too, where they are linear layers, embeddings, convolutions or norms.
    Raises ValueError for an unknown name, a batch of another length, a layer whose rows cannot be told apart, and trained copies
    of other modules.
    RuntimeError on a merged model, and for switching, adding, detaching or merging inside the block.
    """
    model = unwrap(model)
    state = state_of(model)
    _check(model, names)
    batch = Batch(names)
    before = (state.active, state.mix, state.rows)
    routes = [(layer, layer.active, layer.mix, layer.route) for layer in layers_of(model).values()]
    state.active, state.mix = tuple(dict.fromkeys(n for n in names if n is not None)), None
    state.rows = batch
    hooks = [
        model.register_forward_pre_hook(
            lambda module, args, kwargs: batch.enter(args, kwargs) if state.rows is batch else None, with_kwargs=True
        )
    ]
    try:
        for layer, *_ in routes:
            _route_rows(layer, batch)
        alike = len(set(names)) == 1
        swap_copies(model, state.active if alike else (), None)
        if not alike:
            hooks += [_give_rows_copies(model, owner, copies, batch) for owner, copies in copies_of(model).items()]
        with _told_of_generate(model, batch):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        state.active, state.mix, state.rows = before
        for layer, active, mix, route in routes:
            layer.active, layer.mix, layer.route = active, mix, route
        outer = state.rows is not None and len(set(state.rows.names)) > 1
        swap_copies(model, () if outer else state.active, state.mix)


def _route_rows(layer: Layer, batch: Batch) -> None:
    here = [n if n is not None and n in layer else None for n in batch.names]
    if len(set(here)) == 1:
        route_layer(layer, [n for n in here[:1] if n is not None], None)
        return
    route = RowRoute(batch, [None if n is None else layer[n] for n in here])  # type: ignore[misc]
    route.places(1, layer.site.device)
    layer.active, layer.route = (*route.low, *route.others), route


def _check(model: nn.Module, names: Sequence[str | None]) -> None:
    state = state_of(model)
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(
            f"names is a {type(names).__name__}; give a list with one adapter name (or None) for each row of the batch"
        )
    if not names:
        raise ValueError("names is empty; give one adapter name (or None) for each row of the batch")
    if state.merged:
        raise RuntimeError(
            f"the model is merged with {', '.join(state.merged)}; call loratory.unmerge(model) before serving rows"
        )
    for name in dict.fromkeys(names):
        if name is not None:
            require_adapter(model, name)
    if len(set(names)) == 1:
        return
    for owner, copies in copies_of(model).items():
        whole = next((n for n in names if n is not None and n in copies), None)
        if whole is not None:
            _check_row_by_row(model, owner, whole)
    for name, layer in layers_of(model).items():
        if any(n in layer for n in names if n is not None):
            if not layer.site.called or layer.site.kind == "block":
                raise ValueError(
                    f"layer '{name}' is {'a bare parameter' if not layer.site.called else 'a body with virtual tokens'}, which all rows of a batch "
                    "share; run these rows one adapter after the other"
                )
            _check_layout(model, name)


def _check_layout(model: nn.Module, layer: str) -> None:
    """Refuse layers whose input has its rows elsewhere than in the first dimension."""
    parts = layer.split(".")
    if "experts" in parts[:-1]:
        raise ValueError(
            f"layer '{layer}' is one of several experts, whose input holds the tokens routed to it and not the rows of the batch; run these "
            "rows one adapter after the other, or train the adapters without the experts (exclude=)"
        )
    for i in range(len(parts)):
        for child in model.get_submodule(".".join(parts[:i])).children():
            if isinstance(child, nn.MultiheadAttention) and not child.batch_first:
                raise ValueError(
                    f"layer '{layer}' belongs to a transformer with batch_first=False, whose first dimension is time; build it with "
                    "batch_first=True, or run these rows one adapter after the other"
                )


def _check_row_by_row(model: nn.Module, owner: str, name: str) -> None:
    """Refuse copies of modules that are not known to treat each row by itself."""
    module = model.get_submodule(owner)
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    if batch_norm and module.training:
        raise ValueError(
            f"adapter '{name}' has its own copy of the batch norm '{owner}', which in training mixes the rows of a batch; call model.eval(), "
            "or run its rows in a batch of their own"
        )
    plain = batch_norm or isinstance(module, _ROW_BY_ROW) or type(module).__name__.endswith(("RMSNorm", "Conv1D"))
    if not plain:
        raise ValueError(
            f"adapter '{name}' has its own copy of '{owner or 'the model'}' ({type(module).__name__}), which is not known to treat each row of a "
            "batch by itself (linear layers, embeddings, convolutions and norms are); run its rows in a batch of their own"
        )


def _give_rows_copies(model: nn.Module, owner: str, copies: Copies, batch: Batch) -> Any:
    """A hook that gives the rows of each adapter with copies of this module's tensors the output that they make."""
    module: Any = model.get_submodule(owner)
    state, layer = state_of(model), module._modules.get(LAYER, ())
    distinct = [n for n in dict.fromkeys(batch.names) if n is not None and n in copies]
    forward = type(module).__mro__[1 if is_swapped(module) else 0].forward  # type: ignore[attr-defined]

    def own_rows(module: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        if state.rows is not batch or not distinct:
            return None
        x = batch.fit(owner, args[0])
        y, at = y.expand(x.shape[0], *y.shape[1:]), _numbers(batch, distinct, x)
        for i, name in enumerate(distinct):
            copy: Any = copies[name]
            mine = (at == i).nonzero().flatten()
            if name in layer:  # an adapted layer's copy is its bias, which each path adds
                more = layer.site.along_out(copy.bias - copies[BASE].bias).to(y.dtype)
                y = y.index_add(0, mine, more.expand(len(mine), *y.shape[1:]))
                continue
            with _in_place(module, copy):
                part = forward(module, x.index_select(0, mine), *args[1:])
            y = y.index_copy(0, mine, part.to(y.dtype))
        return y

    return module.register_forward_hook(own_rows)


def _numbers(batch: Batch, distinct: list[str], x: Tensor) -> Tensor:
    """For each row of x the number of its adapter among these; -1: none of them."""
    copies = x.shape[0] // batch.size
    numbers = [distinct.index(n) if n in distinct else -1 for n in batch.names for _ in range(copies)]
    return torch.tensor(numbers, device=x.device)


@contextmanager
def _in_place(module: nn.Module, copy: Copy) -> Iterator[None]:
    """A module with the tensors of a copy."""
    before = dict(module._parameters), dict(module._buffers)
    module._parameters |= dict(copy.named_parameters())
    module._buffers |= dict(copy.named_buffers())
    try:
        yield
    finally:
        module._parameters, module._buffers = before


@contextmanager
def _told_of_generate(model: Any, batch: Batch) -> Iterator[None]:
    """While the model generates, `batch` knows how many sequences a row is expanded to."""
    if not hasattr(model, "generate"):
        yield
        return
    original, own = model.generate, model.__dict__.get("generate")

    @wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        batch.expected = _sequences(model, kwargs)
        try:
            return original(*args, **kwargs)
        finally:
            batch.expected, batch.copies = None, 1

    model.__dict__["generate"] = generate
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["generate"]
        else:
            model.__dict__["generate"] = own


def _sequences(model: Any, kwargs: dict[str, Any]) -> int:
    configs = [kwargs.get("generation_config"), getattr(model, "generation_config", None)]
    counts = []
    for field in ("num_beams", "num_return_sequences"):
        given = [kwargs.get(field), *(getattr(c, field, None) for c in configs)]
        counts.append(next((v for v in given if v is not None), 1))
    return max(counts)


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The length of the first dimension of a call's main input."""
    inputs = [*args, *(kwargs.get(name) for name in _MAIN), *kwargs.values()]
    return next((v.shape[0] for v in inputs if isinstance(v, Tensor) and v.dim()), None)


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
