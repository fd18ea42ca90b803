"""Which path a layer takes, chosen when the user switches adapters.

none active      base(x)
one, rung 1      base(x) + B A x, fused where the layer is plain, with its siblings (see `fuse`); a diagonal core acts on A x, so
                 that no B with it is kept, and factors as large as the weight are made again in the backward pass
one, rung 2      (W + D) x + bias, or with dropout base(x) + D dropout(x); D made again in the backward pass
one, rung 3      W' x + bias
one, rung 4      the method's own forward
several or mixed W + sum m_i (W'_i - W), and for rung 4  base + sum m_i (y_i - base)
one a batch row  see `rows`

A bare parameter has no x: its route gives W' by the same table (see `runtime.parameter`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from loratory.methods.method import scaled_factors, two_factors
from loratory.ops.made_again import product
from loratory.ops.recomputed_delta import with_delta
from loratory.runtime.block import refuse_two_blocks
from loratory.runtime.fuse import fuse
from loratory.runtime.layer import BASE, MIXED, Adapter, Copies, Copy, Holding, Layer, Route, copies_of, layers_of
from loratory.runtime.norms import hold_norms
from loratory.runtime.parameter import base_weight, low_rank_weight, mixed_weight, whole_weight
from loratory.runtime.shards import refuse_sharded
from loratory.runtime.state import adapter_names, refuse_in_rows, require_adapter, state_of, unwrap
from loratory.runtime.ties import say_ties
from loratory.sites import Site
from loratory.sites.linear import LinearSite

Base = Callable[[Tensor], Tensor]
Output = Callable[[Site, Adapter, Base, Tensor], Tensor]
Mixes = dict[tuple[torch.device, tuple[float, ...]], Tensor]


def base_route(layer: Layer, base: Base, x: Tensor) -> Tensor:
    return base(x)


def low_rank_route(layer: Layer, base: Base, x: Tensor) -> Tensor:
    (t,) = layer.active
    B, s, A = scaled_factors(t.method.factors(t))
    u = _dropped(layer.site, t, x)
    return layer.site.low_rank(x, base, A, B, None if u is x else u, s)


def diagonal_output(site: Site, t: Adapter, base: Base, x: Tensor) -> Tensor:
    dtype, factors = site.compute_dtype(x), t.method.factors(t)
    B, d, A = (factor.to(dtype) for factor in cast(tuple[Tensor, Tensor, Tensor], factors))
    h = site.down(_dropped(site, t, x), A)
    return base(x) + site.up(h * site.along_out(d.expand(*A.shape[:-1])), B)


def wide_output(site: Site, t: Adapter, base: Base, x: Tensor) -> Tensor:
    dtype, own = site.compute_dtype(x), list(t.trained().values())

    def made(factor: int) -> Tensor:
        return two_factors(t.method.factors(t))[factor].to(dtype)

    B, A = (factor.to(dtype) for factor in two_factors(t.method.factors(t)))
    h = product(_dropped(site, t, x).to(dtype), A, partial(made, 1), own)
    return base(x) + product(h, B, partial(made, 0), own)


def delta_output(site: Site, t: Adapter, base: Base, x: Tensor) -> Tensor:
    own = t.trained()

    def delta(tensors: Sequence[Tensor]) -> Tensor:
        return t.method.delta(Holding(t, dict(zip(own, tensors, strict=True))))

    keep = getattr(t.method, "cache_delta", False)
    return with_delta(x, _dropped(site, t, x), base, site, delta, list(own.values()), keep=keep)


def weight_output(site: Site, t: Adapter, base: Base, x: Tensor) -> Tensor:
    return site.with_bias(site.apply(x, t.method.weight(t, site.read())))


def forward_output(site: Site, t: Adapter, base: Base, x: Tensor) -> Tensor:
    return t.method.forward(t, x, base, site)


OUTPUTS: dict[int, Output] = {2: delta_output, 3: weight_output, 4: forward_output}  # of one adapter, by its rung


def single(output: Output) -> Route:
    def route(layer: Layer, base: Base, x: Tensor) -> Tensor:
        (t,) = layer.active
        return output(layer.site, t, base, x)

    return route


def mixed_route(layer: Layer, base: Base, x: Tensor) -> Tensor:
    site, y0 = layer.site, base(x)
    y, dtype = y0, site.compute_dtype(x)
    for i, t in enumerate(layer.active):
        m, method = layer.mix[i].to(dtype), t.method
        if method.rung == 4:
            y = y + m * (method.forward(t, x, base, site) - y0)
        elif method.rung == 3:
            W = site.read()
            y = y + m * site.apply(x, method.weight(t, W) - W)
        else:
            u = _dropped(site, t, x)
            if method.rung == 2:
                y = y + m * site.apply(u, method.delta(t).to(dtype))
            else:
                B, A = two_factors(method.factors(t))
                y = y + m * site.up(site.down(u, A.to(dtype)), B.to(dtype))
    return y


def _dropped(site: Site, t: Adapter, x: Tensor) -> Tensor:
    """An update's own input: x itself where there is no dropout."""
    p = t.method.input_dropout
    return site.drop(x, p, True) if p and t.training else x


wide_route, diagonal_route = single(wide_output), single(diagonal_output)
ROUTES: dict[int, Route] = {1: low_rank_route} | {rung: single(output) for rung, output in OUTPUTS.items()}
READ_ROUTES: dict[int, Route] = {1: low_rank_weight, 2: whole_weight, 3: whole_weight, 4: whole_weight}


def check_names(model: nn.Module, names: Sequence[str], mix: Sequence[float] | None) -> None:
    """Refuse names and weights that no adapters can be chosen by."""
    refuse_in_rows(model, "switching adapters")
    for name in names:
        require_adapter(model, name)
    if len(set(names)) != len(names):
        raise ValueError(f"the names {names} repeat one; name each adapter once and weigh it with mix=")
    if mix is not None and len(mix) != len(names):
        raise ValueError(f"mix holds {len(mix)} weights for {len(names)} adapters ({', '.join(names)}); give one each")
    for name, m in zip(names, mix or (), strict=False):
        if not math.isfinite(m):
            raise ValueError(f"mix holds {m} for adapter '{name}'; each weight must be a finite number")


def use(model: nn.Module, *names: str, mix: Sequence[float] | None = None) -> None:
    """Make these adapters the active ones: W' = W + sum m_i (W'_i - W), m_i = 1 without `mix`.

    No name: the base alone. What is trained (`requires_grad`) does not change.
    Raises ValueError for an unknown or repeated name, or a mix of another length; RuntimeError on a merged model or inside `rows`.
    """
    state = state_of(model)
    check_names(model, names, mix)
    if state.merged:
        raise RuntimeError(
            f"the model is merged with {', '.join(state.merged)}; call loratory.unmerge(model) before switching adapters"
        )
    refuse_two_blocks(model, names, mix)
    _refuse_sharded_copies(unwrap(model), names, None if mix is None else tuple(float(m) for m in mix))
    state.active, state.mix = names, None if mix is None else tuple(float(m) for m in mix)
    route_layers(layers_of(model), names, state.mix)
    swap_copies(model, names, state.mix)


def swap_copies(model: nn.Module, names: Sequence[str], mix: Sequence[float] | None) -> None:
    """Put the trained copies of these adapters, or the base's own tensors, into their modules."""
    for name, copies in copies_of(model).items():
        _swap_copies(model.get_submodule(name), copies, names, mix)
    hold_norms(unwrap(model))
    say_ties(unwrap(model), state_of(model).tied)


def route_layers(layers: Mapping[str, Layer], names: Sequence[str], mix: Sequence[float] | None) -> None:
    """Set the active adapters and the path of each layer; those that share their input run as one."""
    mixes: Mixes = {}
    for layer in layers.values():
        route_layer(layer, names, mix, mixes)
    fuse(layers, low_rank_route)


def route_layer(layer: Layer, names: Sequence[str], mix: Sequence[float] | None, mixes: Mixes | None = None) -> None:
    """Set one layer's active adapters and its path. mixes: tensors of mixes that other layers have already."""
    here = [(name, 1.0 if mix is None else mix[i]) for i, name in enumerate(names) if name in layer]
    layer.active = tuple(layer[name] for name, _ in here)  # type: ignore[misc]
    mixes, device, values = {} if mixes is None else mixes, layer.site.device, tuple(m for _, m in here)
    if (device, values) not in mixes:
        mixes[device, values] = torch.tensor(values, device=device)
    layer.mix = mixes[device, values]
    called = layer.site.called
    if not here or layer.site.kind == "block":  # a body's forward asks for the active adapter itself
        rest(layer)
    elif len(here) == 1 and here[0][1] == 1.0:
        method = layer.active[0].method
        layer.route = (ROUTES if called else READ_ROUTES)[method.rung]
        if isinstance(layer.site, LinearSite) and method.rung == 1 and method.full_rank:
            layer.route = wide_route
        elif called and method.rung == 1 and method.core_form == "diagonal":
            layer.route = diagonal_route
    else:
        layer.route = mixed_route if called else mixed_weight
    if layer.site.own_forward is not None:
        layer.route = partial(_with_own_forward, layer.route)


def _with_own_forward(route: Route, layer: Layer, base: Base, x: Tensor) -> Tensor:
    assert layer.site.own_forward is not None
    return route(layer, layer.site.own_forward, x)


def rest(layer: Layer) -> None:
    """Let a layer run its own weight alone."""
    layer.route = base_route if layer.site.called else base_weight


def _swap_copies(module: nn.Module, copies: Copies, names: Sequence[str], mix: Sequence[float] | None) -> None:
    """Put the active adapter's copies, or the base's own tensors, into the module; several are mixed into a frozen tensor."""
    base = copies[BASE]
    here = [(copies[name], 1.0 if mix is None else mix[i]) for i, name in enumerate(names) if name in copies]
    if MIXED in copies:
        del copies[MIXED]
    if not here:
        chosen = base
    elif len(here) == 1 and here[0][1] == 1.0:
        chosen = here[0][0]
    else:
        chosen = copies[MIXED] = Copy(
            {
                name: nn.Parameter(
                    torch.add(p, sum(m * (getattr(c, name) - p) for c, m in here if hasattr(c, name))).detach(), False
                )
                for name, p in base.named_parameters()
            }
        )
    for name, p in base.named_parameters():
        module._parameters[name] = getattr(chosen, name, p)
    for name, b in base.named_buffers():
        module._buffers[name] = getattr(chosen, name, b)


def _refuse_sharded_copies(model: nn.Module, names: Sequence[str], mix: Sequence[float] | None) -> None:
    """fully_shard puts the tensors it found back at each forward pass, so another choice of copies would not last."""
    state = state_of(model)
    for owner, copies in copies_of(model).items():
        then, now = (
            [(n, 1.0 if m is None else m[i]) for i, n in enumerate(chosen) if n in copies]
            for chosen, m in ((state.active, state.mix), (names, mix))
        )
        if then != now:
            refuse_sharded(
                model,
                f"'{owner or 'the model'}', which is trained in full, keeps the tensors it was sharded with",
                "choose the adapters before fully_shard, or load the saved adapter into a model that is not sharded",
            )


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base alone inside this block."""
    state = state_of(model)
    if state.rows is not None:
        from loratory.runtime.rows import rows

        with rows(model, [None] * state.rows.size, dim=state.rows.dim):
            yield
        return
    names, mix = state.active, state.mix
    use(model)
    try:
        yield
    finally:
        use(model, *names, mix=mix)


def active(model: nn.Module) -> tuple[str, ...]:
    """Names of the active adapters."""
    return state_of(model).active


def adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of all adapters of the model."""
    return adapter_names(model)
