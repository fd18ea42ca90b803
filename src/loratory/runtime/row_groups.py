"""Rows that cannot share one call of the model: it runs once for each group of them.

A group is all rows of one adapter that needs the batch for itself, or all rows of the other adapters together. While the model
runs for a group, its layers and copies are set for that group's rows alone, as if it had been called with them.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loratory.runtime.divide import Groups, copied, is_cache, join, put_cache, take
from loratory.runtime.layer import Adapter, Layer, Route, copies_of, layers_of
from loratory.runtime.route import route_layer, swap_copies
from loratory.runtime.row_copies import give_rows_copies, treats_rows_apart
from loratory.runtime.row_route import Batch, LostRows, RowRoute, batch_size
from loratory.runtime.state import state_of


class Setting(NamedTuple):
    """What one layer does."""

    layer: Layer
    active: tuple[Adapter, ...]
    mix: Tensor
    route: Route


class Part(NamedTuple):
    """Rows that run in one call, and what the layers do for them."""

    rows: list[int]
    batch: Batch
    settings: list[Setting]


class Plan:
    """Which rows of a batch run together."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model, self.batch, self.state = model, batch, state_of(model)
        self.layers, self.copies = layers_of(model), copies_of(model)
        self.alone = {n for n in batch.names if n is not None and self._needs_all_rows(n)}
        self.sure = False  # a call in these groups has succeeded
        self.hooks: list[Any] = []
        self.parts: list[Part] = []

    def _needs_all_rows(self, name: str) -> bool:
        owners = [owner for owner, copies in self.copies.items() if name in copies]
        if self.batch.alike:
            return False
        if self.batch.dim or not all(treats_rows_apart(self.model.get_submodule(owner)) for owner in owners):
            return True
        return any(
            name in layer and (not layer.site.called or layer.site.kind == "block" or self._hides_rows(at))
            for at, layer in self.layers.items()
        )

    def _hides_rows(self, layer: str) -> bool:
        """Whether a layer's input has its rows elsewhere than in the first dimension."""
        parts = layer.split(".")
        above = [self.model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
        return "experts" in parts[:-1] or any(_is_time_first(child) for m in above for child in m.children())

    def divide(self) -> None:
        """Make the groups, and what the layers do outside of them."""
        batch = self.batch
        groups: dict[str | None, list[int]] = {}
        for i, name in enumerate(batch.names):
            groups.setdefault(name if name in self.alone or batch.dim else None, []).append(i)
        before = self.settings()
        self.parts = []
        for rows in groups.values():
            own = Batch([batch.names[i] for i in rows]) if len(groups) > 1 else batch
            for layer in self.layers.values():
                _route_rows(layer, own)
            self.parts.append(Part(rows, own, self.settings()))
        _put(before)
        for hook in self.hooks:
            hook.remove()
        each = [part.batch for part in self.parts if not part.batch.alike]
        self.hooks = [give_rows_copies(self.model, at, copies, b) for b in each for at, copies in self.copies.items()]
        if len(self.parts) > 1:
            self.hooks += [
                m.register_forward_pre_hook(self._check_time_first(name), with_kwargs=True)
                for name, m in self.model.named_modules()
                if _is_time_first(m)
            ]
            self.hooks += [
                layer.site.module.register_forward_pre_hook(partial(self._check_group, layer))
                for layer in self.layers.values()
                if layer.site.kind == "block" and layer.site.module is not self.model
            ]

    def settings(self) -> list[Setting]:
        return [Setting(layer, layer.active, layer.mix, layer.route) for layer in self.layers.values()]

    @contextmanager
    def block(self) -> Iterator[None]:
        """The model as it is inside the `rows` block."""
        self.divide()
        with self.serving(self.batch, self.outside()), ExitStack() as stack:
            if not self.batch.alike:
                for entry in _entries(self.model):
                    stack.enter_context(self._grouped(entry))
            try:
                yield
            finally:
                for hook in self.hooks:
                    hook.remove()

    def outside(self) -> list[Setting]:
        """What the layers do where no group runs."""
        if len(self.parts) == 1:
            return self.parts[0].settings
        return [s._replace(route=_outside) for s in self.parts[0].settings]

    @contextmanager
    def serving(self, batch: Batch, settings: list[Setting]) -> Iterator[None]:
        """The model set for this batch."""
        before, rows = self.settings(), self.state.rows
        _put(settings)
        self.state.rows = batch
        self._swap_copies()
        try:
            yield
        finally:
            self.state.rows = rows
            _put(before)
            self._swap_copies()

    def _swap_copies(self) -> None:
        batch = self.state.rows
        if not self.copies:
            return
        if batch is None:
            swap_copies(self.model, self.state.active, self.state.mix)
        else:
            swap_copies(self.model, [n for n in batch.names[:1] if n is not None] if batch.alike else (), None)

    @contextmanager
    def _grouped(self, entry: Any) -> Iterator[None]:
        """While a module runs its forward, the rows are served by this plan."""
        original, own = entry.forward, entry.__dict__.get("forward")

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.state.rows is not self.batch or (torch.compiler.is_compiling() and len(self.parts) == 1):
                return original(*args, **kwargs)
            return self.run(original, *_named(original, args, kwargs))

        entry.__dict__["forward"] = forward
        try:
            yield
        finally:
            del entry.__dict__["forward"]
            if own is not None:
                entry.__dict__["forward"] = own

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the model. Where a layer turns out to hide its rows, its adapters run alone from then on."""
        while True:
            caches = {} if self.sure else {k: v for k, v in kwargs.items() if v is not None and _is_cache(v)}
            kept = {k: copied(v, Tensor.clone) for k, v in caches.items()}
            try:
                out = forward(*args, **kwargs) if len(self.parts) == 1 else self._run_parts(forward, args, kwargs)
                self.sure = True
                return out
            except LostRows as e:
                here = self.layers.get(e.layer, ()), self.copies.get(e.layer, ())
                lost = {n for n in self.batch.names if n is not None and any(n in names for names in here)}
                if lost <= self.alone:
                    raise
            for key, cache in caches.items():
                put_cache(cache, kept[key])
            self.alone |= lost
            self.divide()
            _put(self.outside())

    def _run_parts(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = batch_size(args, kwargs, self.batch.dim) or self.batch.size
        groups = Groups([part.rows for part in self.parts], self.batch.dim).spread(found // self.batch.size)
        outs, caches = [], []
        with _loss_put_off(self.model) as (zero, calls):
            for g, part in enumerate(self.parts):
                part.batch.copies = found // self.batch.size
                mine = {k: take(v, groups, g, k) for k, v in kwargs.items()}
                with self.serving(part.batch, part.settings), self._recomputing(part):
                    outs.append(forward(*[take(v, groups, g) for v in args], **mine))
                caches.append({k: v for k, v in mine.items() if v is not None and _is_cache(v)})
        known: dict[int, Any] = {}  # what stands in the place of a value of the first group
        if len(calls) == len(outs):
            loss_args, loss_kwargs = join(calls, groups)
            known[id(zero)] = self.model.loss_function(*loss_args, **loss_kwargs)  # type: ignore[operator]
        for key, first in caches[0].items():
            put_cache(kwargs[key], join([c[key] for c in caches], groups))
            known[id(first)] = kwargs[key]
        return join(outs, groups, known)

    @contextmanager
    def _recomputing(self, part: Part) -> Iterator[None]:
        """Blocks that gradient checkpointing computes again in the backward pass are then set for the same rows."""
        checkpointed: list[Any] = []
        if torch.is_grad_enabled():
            checkpointed = [m for m in self.model.modules() if "_gradient_checkpointing_func" in m.__dict__]
        before = [m._gradient_checkpointing_func for m in checkpointed]

        def checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
            def served(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                def again(*inputs: Any, **more: Any) -> Any:
                    with self.serving(part.batch, part.settings):
                        return function(*inputs, **more)

                return original(again, *args, **kwargs)

            return served

        for m in checkpointed:
            m._gradient_checkpointing_func = checkpoint(m._gradient_checkpointing_func)
        try:
            yield
        finally:
            for m, function in zip(checkpointed, before, strict=True):
                m._gradient_checkpointing_func = function

    def _check_group(self, layer: Layer, *args: Any) -> None:
        if self.state.rows is self.batch:  # a body has no route
            _outside(layer)

    def _check_time_first(self, name: str) -> Callable[..., None]:
        def check(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, batch = args[0] if args else kwargs["query"], self.state.rows
            if not any(batch is p.batch for p in self.parts) or x.dim() != 3:
                return
            if x.shape[1] != batch.size * batch.copies:
                raise ValueError(
                    f"'{name}' has batch_first=False and gets {tuple(x.shape)}, whose second dimension is not the group of {batch.size} rows; "
                    "if the model's own inputs have time first, give rows(..., dim=1)"
                )

        return check


def _route_rows(layer: Layer, batch: Batch) -> None:
    here = [n if n is not None and n in layer else None for n in batch.names]
    if len(set(here)) == 1:
        route_layer(layer, [n for n in here[:1] if n is not None], None)
        return
    if not layer.site.called or layer.site.kind == "block":  # outside of groups, which each have one
        route_layer(layer, [], None)
        return
    route = RowRoute(batch, [None if n is None else layer[n] for n in here])  # type: ignore[misc]
    route.places(1, layer.site.device)
    layer.active, layer.route = (*route.low, *route.others), route


def _put(settings: list[Setting]) -> None:
    for layer, active, mix, route in settings:
        layer.active, layer.mix, layer.route = active, mix, route


def _outside(layer: Layer, *args: Any) -> Tensor:
    raise RuntimeError(
        f"layer '{layer.site.name}' runs outside the model's forward, which inside this rows() block runs its rows in groups; call the model "
        "itself (for gradient checkpointing, model.gradient_checkpointing_enable()), or run the rows one adapter after the other"
    )


def _entries(model: Any) -> list[Any]:
    """What is called with the whole batch: the model, and an encoder that `generate` runs first."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return [model]
    encoder = model.get_encoder()
    return [model, encoder] if encoder is not model else [model]


def _named(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a call, by name where they have one."""
    found = inspect.signature(forward).parameters.values()
    if any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in found) or len(args) > len(found):
        return args, kwargs
    return (), dict(zip((p.name for p in found), args, strict=False)) | kwargs


def _is_time_first(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and not module.batch_first


def _is_cache(value: Any) -> bool:
    return not isinstance(value, Tensor | dict | list | tuple) and is_cache(value)


@contextmanager
def _loss_put_off(model: Any) -> Iterator[tuple[Tensor, list[Any]]]:
    """The model's loss function only notes what it is called with, and gives a zero in its place."""
    zero = torch.zeros(())
    calls: list[Any] = []
    if not hasattr(type(model), "loss_function"):
        yield zero, calls
        return

    def note(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((args, kwargs))
        return zero

    own = model.__dict__.get("_loss_function")
    model.__dict__["_loss_function"] = note
    try:
        yield zero, calls
    finally:
        del model.__dict__["_loss_function"]
        if own is not None:
            model.__dict__["_loss_function"] = own
