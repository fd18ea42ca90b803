"""New LoRA adapters from existing ones: sums, SVD, TIES, DARE; another rank for one of them."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loratory.methods.fields import check_choice, check_positive_int
from loratory.methods.lora import LoRA, scale
from loratory.methods.method import Declared, Method, trained
from loratory.methods.start import low_rank_start
from loratory.ops.svd import norm_of_product
from loratory.ops.task_arithmetic import Sign, combined
from loratory.runtime.attach import Built, install
from loratory.runtime.attachable import check_attachable
from loratory.runtime.layer import Adapter, Layer, layers_of
from loratory.runtime.low_rank import (
    Approximation,
    Factors,
    approximation,
    nearest_of,
    own_factors,
    refuse_broken,
    truncated,
    truncated_product,
    update,
)
from loratory.runtime.route import use
from loratory.runtime.state import Adaptation, one_name, refuse_in_rows, require_adapter, state_of, unwrap

SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
SCHEMES = ("linear", "cat", "svd", *SPARSE, *(f"{each}_svd" for each in SPARSE))


def combine(
    model: nn.Module,
    names: Sequence[str],
    into: str,
    how: str = "linear",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float | None = None,
    sign: Sign = "total",
    seed: int | None = None,
    trainable: bool = False,
) -> Approximation:
    """Make a LoRA adapter out of others and make it active; they stay. The schemes and names are PEFT's.

    cat      the weighted sum of the updates, exactly: factors side by side (rank: the sum of theirs, at most min(in, out))
    svd      the nearest update of `rank` to that sum (default: the largest of their ranks); from adapters of any mergeable method
    linear   sums of the A and of the B: cheap, of one rank, and not the sum of the updates
    ties, dare_linear, dare_ties, magnitude_prune: the A and the B by TIES or DARE, with a `density` in (0, 1] kept; adapters of
    one rank. With `_svd` added: the updates themselves so, then the nearest of `rank`.
    weights: one for each adapter, 1 by default. sign: how TIES elects ("total" or "frequency"). seed: of DARE's draws.
    Returns the relative distance of each layer, and in total, from the weighted sum of the updates: the error of cat, svd and
    linear, and for the others what they deliberately changed.
    Raises ValueError for wrong values, adapters that also train modules in full, or ranks that differ where they must not.
    """
    model = unwrap(model)
    check_attachable(model, into)
    names = _names(model, names)
    given = _weights(names, weights)
    _check_options(how, rank, density, sign)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    built: Built = {}
    factors: dict[str, Factors] = {}
    for layer_name, layer in layers_of(model).items():
        parts = [(layer[n], w) for n, w in zip(names, given, strict=True) if n in layer]
        if not parts:
            continue
        with torch.no_grad():
            made = factors[layer_name] = _combine_layer(layer, parts, how, rank, density or 1.0, sign, generator)  # type: ignore[arg-type]
        method = LoRA(rank=made.A.shape[-2])
        built[layer_name] = (layer.site, method, _declared(layer, made.B, made.A))
    top = LoRA(rank=max(method.rank or 1 for _, method, _ in built.values()))  # type: ignore[attr-defined]
    adaptation = Adaptation(top, {n: method for n, (_, method, _) in built.items()}, [])
    install(model, into, adaptation, built, trainable=trainable)
    mixed = ", ".join(f"{w:g} {n}" for n, w in zip(names, given, strict=True))
    return approximation(f"'{into}' = {how} of {mixed}", factors)


def change_rank(
    model: nn.Module, rank: int, *, name: str | None = None, into: str | None = None, seed: int | None = None
) -> Approximation:
    """Give an adapter (the active one) another rank: in place, or as a new LoRA adapter `into`.

    Lower: the nearest update of that rank. Higher: the same update, with rows that start as LoRA's do (seed) and may be trained.
    A layer whose min(in, out) is less gets that. In place the tensors are new ones: make a new optimizer.
    Raises ValueError for a rank < 1, or a method other than LoRA without `into`.
    """
    model = unwrap(model)
    refuse_in_rows(model, "changing a rank")
    name = one_name(model, name)
    adaptation = require_adapter(model, name)
    check_positive_int("rank", rank)
    if into is not None:
        check_attachable(model, into)
        if adaptation.copied:
            raise ValueError(_copies_message(name, adaptation))
    if adaptation.method.trains != "factors" or (into is None and type(adaptation.method) is not LoRA):
        raise ValueError(
            f"adapter '{name}' is a {type(adaptation.method).__name__}, whose rank cannot be changed in place; "
            "only LoRA's can: give into= for a new LoRA adapter that is nearest to it"
        )
    if state_of(model).merged:
        raise RuntimeError("the model is merged; call loratory.unmerge(model) before changing a rank")
    generator = None
    built: Built = {}
    factors: dict[str, Factors] = {}
    for layer_name, layer in layers_of(model).items():
        if name not in layer:
            continue
        t: Adapter = layer[name]  # type: ignore[assignment]
        least = min(rank, layer.site.outputs, layer.site.inputs)
        with torch.no_grad():
            made = nearest_of(layer, t, least)
            if seed is not None and generator is None:
                generator = torch.Generator(device=layer.site.device).manual_seed(seed)
            layer.site.generator = generator
            made = factors[layer_name] = _grown(layer, made, least)
            layer.site.generator = None
        own = t.method if type(t.method) is LoRA else LoRA()
        method = dataclasses.replace(own, rank=least, alpha=None, rslora=False)
        built[layer_name] = (layer.site, method, _declared(layer, made.B, made.A, method.lr_ratio))
    methods: dict[str, Method] = {n: method for n, (_, method, _) in built.items()}
    base = adaptation.method if type(adaptation.method) is LoRA else LoRA()
    top = dataclasses.replace(base, rank=rank, alpha=None, rslora=False)
    if into is not None:
        install(model, into, Adaptation(top, methods, []), built, trainable=False)
    else:
        _replace(model, name, built)
        adaptation.method, adaptation.layers = top, methods
    return approximation(f"'{into or name}' at rank {rank}", factors)


def _combine_layer(
    layer: Layer,
    parts: list[tuple[Adapter, float]],
    how: str,
    rank: int | None,
    density: float,
    sign: Sign,
    generator: torch.Generator | None,
) -> Factors:
    for t, _ in parts:
        refuse_broken(layer, t)
    most = min(layer.site.outputs, layer.site.inputs)
    own = [own_factors(t) for t, _ in parts]
    weights = torch.tensor([w for _, w in parts], dtype=torch.float64)
    if how in ("cat", "svd") and all(f is not None for f in own):
        B, A = _side_by_side(own, weights)
        if how == "cat" and A.shape[-2] <= most:
            return Factors(B, A, 0.0, norm_of_product(B.double(), A.double()))
        return truncated_product(B, A, most if how == "cat" else min(most, rank or _largest(parts)))
    if how == "cat" or not how.endswith("svd"):
        raw = [_raw(layer, t, how) for t, _ in parts]
        target = _side_by_side([(s * B, A) for B, A, s in raw], weights)
        ranks = [A.shape[-2] for _, A, _ in raw]
        if len(set(ranks)) > 1:
            raise ValueError(
                f"layer '{layer.site.name}' has ranks {', '.join(map(str, ranks))} in the adapters, and how='{how}' sums factors of one rank; "
                "use how='cat' or 'svd', or bring them to one rank with loratory.change_rank"
            )
        shares = [float(w) * s for w, (_, _, s) in zip(weights, raw, strict=True)]
        signed = torch.tensor([math.copysign(math.sqrt(abs(v)), v) for v in shares])
        A = combined([A for _, A, _ in raw], signed, how, density=density, sign=sign, generator=generator)
        B = combined([B for B, _, _ in raw], signed.abs(), how, density=density, sign=sign, generator=generator)
        error = norm_of_product(torch.cat([B, -target[0]], -1).double(), torch.cat([A, target[1]], -2).double())
        return Factors(B, A, error, norm_of_product(target[0].double(), target[1].double()))
    updates = [update(layer, t) for t, _ in parts]
    goal = combined(updates, weights, "linear")
    scheme = "linear" if how == "svd" else how.removesuffix("_svd")
    D = combined(updates, weights, scheme, density=density, sign=sign, generator=generator)
    made = truncated(D, min(most, rank or _largest(parts)))
    error = float((made.B.double() @ made.A.double() - goal.double()).norm())
    return Factors(made.B, made.A, error, float(goal.double().norm()))


def _side_by_side(factors: Sequence[tuple[Tensor, Tensor] | None], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of sum w_i B_i A_i."""
    both = [f for f in factors if f is not None]
    B = torch.cat([float(w) * B for w, (B, _) in zip(weights, both, strict=True)], -1)
    return B, torch.cat([A for _, A in both], -2)


def _raw(layer: Layer, t: Adapter, how: str) -> tuple[Tensor, Tensor, float]:
    """B, A and their scale, as they are trained."""
    if type(t.method) is LoRA:
        A, B = t.A.detach(), t.B.detach()  # type: ignore[union-attr, operator]
        return B, A, scale(t.method.alpha, A.shape[-2], t.method.rslora)
    own = own_factors(t)
    if own is None:
        raise ValueError(
            f"layer '{layer.site.name}': {type(t.method).__name__} has no low-rank form, which how='{how}' works on; use how='svd' with a rank"
        )
    return *own, 1.0


def _largest(parts: list[tuple[Adapter, float]]) -> int:
    """The largest rank of the adapters: that of their A."""
    found = [t.tensors().get("A") for t, _ in parts]
    ranks = [A.shape[-2] for A in found if A is not None and A.dim() > 1]
    if not ranks:
        raise ValueError(f"rank is None, and {type(parts[0][0].method).__name__} has none of its own; give rank=")
    return max(ranks)


def _declared(layer: Layer, B: Tensor, A: Tensor, lr_ratio: float = 1.0) -> dict[str, Declared]:
    dtype = torch.float64 if layer.site.dtype == torch.float64 else torch.float32
    made = {n: t.detach().to(layer.site.device, dtype).contiguous().clone() for n, t in (("A", A), ("B", B))}
    return {"A": trained(made["A"]), "B": trained(made["B"], lr=lr_ratio)}


def _grown(layer: Layer, made: Factors, rank: int) -> Factors:
    """The same update with more rows: new ones of A times new, zero columns of B (an embedding: the other way round)."""
    more = rank - made.A.shape[-2]
    if more <= 0:
        return made
    A, B = low_rank_start(layer.site, more, "kaiming")
    return made._replace(A=torch.cat([made.A, A.to(made.A)], -2), B=torch.cat([made.B, B.to(made.B)], -1))


def _replace(model: nn.Module, name: str, built: Built) -> None:
    """Put new tensors under an adapter's name."""
    state, layers = state_of(model), layers_of(model)
    for layer_name, (_, method, declared) in built.items():
        old: Adapter = layers[layer_name][name]  # type: ignore[assignment]
        new = Adapter(method, declared, old.shape).train(old.training)
        new.requires_grad_(any(p.requires_grad for p in old.parameters()))
        layers[layer_name][name] = new
    use(model, *state.active, mix=state.mix)


def _names(model: nn.Module, names: Sequence[str]) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"names is a {type(names).__name__}; give a list of adapter names")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"names is {list(names)}; give each adapter once, at least one")
    for name in names:
        adaptation = require_adapter(model, name)
        if adaptation.method.trains != "factors" or adaptation.copied:
            raise ValueError(_copies_message(name, adaptation))
    return list(names)


def _copies_message(name: str, adaptation: Adaptation) -> str:
    what = f"'{adaptation.copied[0]}'" if adaptation.copied else "nothing by factors"
    return f"adapter '{name}' trains {what} in full, which a LoRA cannot hold; combine adapters of factors alone"


def _weights(names: list[str], weights: Sequence[float] | None) -> list[float]:
    given = [1.0] * len(names) if weights is None else [float(w) for w in weights]
    if len(given) != len(names):
        raise ValueError(
            f"weights holds {len(given)} numbers for {len(names)} adapters ({', '.join(names)}); give one each"
        )
    for name, w in zip(names, given, strict=True):
        if not math.isfinite(w):
            raise ValueError(f"weights holds {w} for adapter '{name}'; each must be a finite number")
    return given


def _check_options(how: str, rank: int | None, density: float | None, sign: str) -> None:
    check_choice("how", how, SCHEMES)
    check_choice("sign", sign, ("total", "frequency"))
    if rank is not None:
        check_positive_int("rank", rank)
        if not how.endswith("svd"):
            raise ValueError(
                f"rank is {rank}, but how='{how}' has the rank of its adapters; leave it out, or use one of the svd schemes"
            )
    sparse = how.removesuffix("_svd") in SPARSE
    if sparse and (density is None or not 0 < density <= 1):
        raise ValueError(f"density is {density}; how='{how}' needs the share of numbers to keep, in (0, 1]")
    if density is not None and not sparse:
        raise ValueError(f"density is {density}, but how='{how}' keeps all numbers; leave it out, or use ties or dare")
