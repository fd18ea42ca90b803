"""Attaching and detaching adapters: `adapt` and `detach`."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from loratory.methods.method import Declared, Method, Shared
from loratory.methods.registry import method_class
from loratory.runtime.attachable import check_attachable, check_layer, check_method, refuse_overlap, refuse_wrapped
from loratory.runtime.collect import Collected, seen_by
from loratory.runtime.copies import install_copies, refuse_tied, whole_modules, with_tied
from loratory.runtime.layer import (
    BASE,
    COPIES,
    SHARED,
    Adapter,
    Pools,
    Tensors,
    copies_of,
    drop_pools,
    is_ours,
    layers_of,
    restore_class,
)
from loratory.runtime.norms import held_note, release_norms
from loratory.runtime.progress import shown
from loratory.runtime.reach import expect_gradients
from loratory.runtime.root import swap_root
from loratory.runtime.route import disabled, use
from loratory.runtime.seat import seat, unseat
from loratory.runtime.shards import refuse_sharded
from loratory.runtime.state import (
    Adaptation,
    State,
    is_adapted,
    refuse_in_rows,
    require_adapter,
    set_state,
    state_of,
    unwrap,
)
from loratory.runtime.summary import told
from loratory.runtime.ties import say_ties, tied_configs
from loratory.runtime.where import Where, head_names, named_parameters, resolve_aliases, select, select_body
from loratory.sites import Bare, Site, find_block, find_site, find_vision, known_parameters

PerLayer = Mapping[str, Mapping[str, Any]]
OPTIONS = (
    "where",
    "parameters",
    "exclude",
    "per_layer",
    "also_train",
    "bias",
    "blocks",
    "untie",
    "allow_unused",
    "seed",
    "seen",
)


def adapt(
    model: nn.Module, method: Method | str, where: Where | None = None, *, name: str = "default", **options: Any
) -> None:
    """Attach a method to chosen layers of a model, in place; the new adapter becomes the active one and the base is frozen.

    method: an instance, or a registered name with its hyper-parameters among the options.
    where: which layers; default "all-linear". See `loratory.runtime.where.select`.
    Options: parameters (bare parameters: names, or {name: axes} with axes such as "out in" or "experts in out" where they are
    not known; without where= only these); exclude (as where); per_layer ({layer name or pattern: {field: value}}); also_train
    (modules trained in full and saved beside); bias ("none", "all", "adapted": biases trained too); blocks (only these numbered blocks); untie (let
    also_train part a tied weight); allow_unused (layers may get no gradient); seed (of the random start); seen (what
    `loratory.collect` gathered, for methods that start from data).
    Names of other libraries (r, lora_alpha, target_modules, modules_to_save, rank_pattern ...) are accepted.
    Nothing is changed when an error is raised. Raises ValueError, TypeError, RuntimeError with the layer and the way out.
    """
    if where is not None:
        options["where"] = where
    given = resolve_aliases(options)
    given = _patterns(given)
    given.pop("task_type", None)
    chosen = {key: given.pop(key) for key in OPTIONS if key in given}
    refuse_wrapped(model)
    model = unwrap(model)
    method = resolve_method(method, given)
    check_attachable(model, name)
    with disabled(model) if is_adapted(model) else nullcontext():  # the base's own weights and ties, whatever is active
        adaptation, built, shared = _build(model, method, name, **chosen)
    install(model, name, adaptation, built, shared)


def resolve_method(method: Method | str, given: dict[str, Any]) -> Method:
    """The method instance for a name and hyper-parameters."""
    if isinstance(method, str):
        if given.pop("use_dora", False):
            method = "dora"
        cls = method_class(method)
        fields = {f.name for f in dataclasses.fields(cls)}
        for key in given:
            if key not in fields:
                known = fields | set(OPTIONS)
                near = ", ".join(get_close_matches(key, known, n=3, cutoff=0.0))
                raise TypeError(
                    f"{cls.__name__} has no hyper-parameter '{key}', and adapt no such option; nearest names: {near}"
                )
        return cls(**given)
    if not isinstance(method, Method):
        raise TypeError(
            f"method is a {type(method).__name__}; give a method such as loratory.LoRA(rank=8), or its name"
        )
    if given:
        raise TypeError(
            f"adapt got {', '.join(sorted(given))} beside a finished {type(method).__name__}; set them on it, or pass its name"
        )
    return method


def _patterns(given: dict[str, Any]) -> dict[str, Any]:
    """PEFT's rank_pattern and alpha_pattern as per_layer."""
    per_layer: dict[str, dict[str, Any]] = {k: dict(v) for k, v in (given.pop("per_layer", None) or {}).items()}
    for key, field in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
        for pattern, value in (given.pop(key, None) or {}).items():
            per_layer.setdefault(pattern, {})[field] = value
    if per_layer:
        given["per_layer"] = per_layer
    return given


Built = dict[str, tuple[Site, Method, Mapping[str, Declared | Shared]]]


def _build(
    model: nn.Module,
    method: Method,
    name: str,
    *,
    where: Where | None = None,
    parameters: Iterable[str] | Mapping[str, str] | None = None,
    exclude: Where | None = None,
    per_layer: PerLayer | None = None,
    also_train: Iterable[str] | str = (),
    bias: str = "none",
    blocks: int | Iterable[int] | None = None,
    untie: bool = False,
    allow_unused: bool = False,
    seed: int | None = None,
    seen: Collected | None = None,
) -> tuple[Adaptation, Built, dict[str, Declared]]:
    """Everything an adapter needs, made without touching the model: its record, each layer's part, and what the layers share."""
    bias = {"lora_only": "adapted"}.get(bias, bias)
    if bias not in ("none", "all", "adapted"):
        raise ValueError(f"bias is {bias!r}; it must be one of none, all, adapted (PEFT's lora_only)")
    also = [part.strip() for part in also_train.split(",")] if isinstance(also_train, str) else list(also_train or ())
    copied = whole_modules(model, also)
    whole = set(copied)
    notes: list[str] = []
    layers: dict[str, nn.Module | Bare] = {}
    if method.trains == "factors":
        if method.acts_on != "layers":
            reads = "images" if method.acts_on == "vision" else "text"
            layers = dict(select_body(model, where or "all-linear", reads, exclude=exclude, blocks=blocks))
        else:
            named = named_parameters(model, parameters)
            if where is not None or not named:
                layers = select(model, where or "all-linear", exclude=exclude, blocks=blocks)
                notes += _left_out(model, where or "all-linear", layers | named)
            elif exclude is not None or blocks is not None:
                raise ValueError(
                    "exclude= and blocks= choose among the layers of where=, which is not given; name the parameters that you want in parameters="
                )
            layers |= named
            refuse_overlap(layers)
    elif method.trains == "all":
        copied = whole_modules(model, [""])
    elif method.trains == "head":
        heads = head_names(model)
        if not heads and not copied:
            raise ValueError(
                "the model has no output head that HeadOnly could train; name the modules to train with also_train="
            )
        copied = whole_modules(model, heads + also)
        refuse_tied(model, copied)
    if bias != "none":
        owners: dict[str, Any] = layers if bias == "adapted" else dict(model.named_modules())  # type: ignore[assignment]
        owners = {n: m.module if isinstance(m, Bare) and m.leaf == "weight" else m for n, m in owners.items()}
        copied += [
            f"{n}.bias"
            for n, m in owners.items()
            if isinstance(m, nn.Module) and isinstance(m._parameters.get("bias"), nn.Parameter) and not is_ours(n)
        ]
    copied = list(dict.fromkeys(copied))
    if not untie:
        copied = with_tied(model, copied, notes)
    notes += held_note(model, copied)
    methods = _per_layer(method, layers, per_layer or {})
    generator = None
    built: Built = {}
    sites: dict[str, Site] = {}
    base_alone = method.acts_on != "layers" and is_adapted(model)  # a start from token ids runs the body
    with disabled(model) if base_alone else nullcontext():
        for layer, module in layers.items():
            check_layer(model, layer, module)
            if seed is not None and generator is None:
                device = (module.tensor if isinstance(module, Bare) else next(module.parameters())).device
                generator = torch.Generator(device=device).manual_seed(seed)
            site = site_for(method, layer, module, generator)
            if site.weight_name in whole or (site.called and any(layer == c.rpartition(".")[0] for c in whole)):
                raise ValueError(
                    f"layer '{layer}' is chosen both by where= and by also_train=; leave it out of one of them"
                )
            check_method(site, methods[layer])
            sites[layer] = site
        methods |= method.per_site({layer: site for layer, site in sites.items() if methods[layer] == method})
        shared = share(method, methods, sites)
        for layer, site in shown(f"adapting with {type(method).__name__}", sites.items()):
            site.together, site.seen = sites, seen_by(site, methods[layer], seen)
            built[layer] = (site, methods[layer], methods[layer].init(site))
            site.together, site.seen = {}, None
    notes += method.notes(sites) + told({layer: site.measured for layer, site in sites.items()})
    return Adaptation(method, methods, copied, bias, untie, allow_unused, notes=notes), built, shared


def share(method: Method, methods: Mapping[str, Method], sites: Mapping[str, Site]) -> dict[str, Declared]:
    """What the layers of an adapter share."""
    shared = method.shared(sites) if sites else {}
    for layer, own in methods.items():
        if shared and own != method:
            raise ValueError(
                f"layer '{layer}' is given settings of its own, but the layers of a {type(method).__name__} share tensors, so all of them "
                "have the same; leave per_layer= out, or give the layer an adapter of its own"
            )
    return shared


def install(
    model: nn.Module,
    name: str,
    adaptation: Adaptation,
    built: Built,
    shared: Mapping[str, Declared] | None = None,
    *,
    trainable: bool = True,
) -> None:
    """Put a built adapter into the model and make it the active one."""
    pool = Tensors(shared, type(adaptation.method).__name__) if shared else None
    ready = {
        layer: Adapter(method, declared, () if site.kind == "block" else tuple(site.shape), pool)
        for layer, (site, method, declared) in built.items()
    }
    if not is_adapted(model):
        trainable_before = {n: p.requires_grad for n, p in model.named_parameters()}
        set_state(model, State(trainable=trainable_before, tied=tied_configs(model)))
        model.requires_grad_(False)
        swap_root(model)
    state = state_of(model)
    for layer, (site, _, _) in built.items():
        adapter = ready[layer].train(site.module.training)
        seat(site)[name] = adapter
        if not trainable:
            adapter.requires_grad_(False)
    if pool is not None:
        if SHARED not in model._modules:
            model.add_module(SHARED, Pools())
        model._modules[SHARED][name] = pool.requires_grad_(trainable)  # type: ignore[index, operator]
    install_copies(model, name, adaptation, trainable)
    state.adaptations[name] = adaptation
    _switch_off_fast_paths(model)
    use(model, name)
    if built:
        expect_gradients(model)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Remove one adapter, or all of them; without adapters the model is as it was, bit for bit, trainable flags included.

    Raises ValueError for an unknown name, RuntimeError on a merged model whose base was not kept.
    """
    from loratory.runtime.merge import unmerge

    model = unwrap(model)
    state = state_of(model)
    refuse_in_rows(model, "detaching an adapter")
    if state.merged:
        unmerge(model)
    names = list(state.adaptations) if name is None else [name]
    for each in names:
        require_adapter(model, each)
    refuse_sharded(
        model,
        "it keeps the adapters it was sharded with",
        "use loratory.disabled(model) for the base alone, or load a fresh model",
    )
    keep = [n for n in state.active if n not in names]
    mix = None if state.mix is None else [m for n, m in zip(state.active, state.mix, strict=True) if n not in names]
    use(model)
    for layer in layers_of(model).values():
        for each in names:
            if each in layer:
                del layer[each]
        if not len(layer):
            unseat(layer)
    drop_pools(model, names)
    for owner, copies in copies_of(model).items():
        for each in names:
            if each in copies:
                del copies[each]
        if set(copies.keys()) == {BASE}:
            del model.get_submodule(owner)._modules[COPIES]
    for each in names:
        del state.adaptations[each]
    if state.adaptations:
        use(model, *keep, mix=mix)
        return
    _restore_fast_paths(model)
    release_norms(model)
    say_ties(model, state.tied)
    for n, p in model.named_parameters():
        p.requires_grad_(state.trainable.get(n, True))
    set_state(model, None)
    restore_class(model)


def site_for(method: Method, name: str, module: Any, generator: torch.Generator | None = None) -> Site:
    """What a method sees of a layer, or of the model's body."""
    find: Any = {"layers": find_site, "body": find_block, "vision": find_vision}[method.acts_on]
    return find(name, module, generator)


def _left_out(model: nn.Module, where: Where, chosen: Mapping[str, Any]) -> list[str]:
    """A note on expert stacks that a preset for linear layers does not mean."""
    asked = {where} if isinstance(where, str) else set() if callable(where) else set(where)
    if not asked & {"all", "all-linear", "mlp"}:
        return []
    stacks = [n for n, bare in known_parameters(model).items() if bare.tensor.dim() > 2 and n not in chosen]
    if not stacks:
        return []
    return [
        f"{len(stacks)} expert stacks ({stacks[0]} ...) stay frozen: they are parameters, chosen by the preset 'experts'"
    ]


def _per_layer(method: Method, layers: Iterable[str], per_layer: PerLayer) -> dict[str, Method]:
    """The method of each layer: a pattern counts where it matches the layer's name or its end, the first one that does."""
    layers = list(layers)
    fields = {f.name for f in dataclasses.fields(method)}
    for pattern, overrides in per_layer.items():
        try:
            re.compile(pattern)
        except re.error as e:
            raise ValueError(
                f"per_layer names '{pattern}', which is no regular expression ({e}); give a layer name or a valid one"
            ) from None
        for key in overrides:
            if key not in fields:
                near = ", ".join(get_close_matches(key, fields, n=3, cutoff=0.0))
                raise TypeError(
                    f"per_layer['{pattern}'] sets '{key}', which {type(method).__name__} does not have; nearest names: {near}"
                )
        if not any(_matches(pattern, name) for name in layers):
            near = ", ".join(
                get_close_matches(pattern, {n for name in layers for n in (name, name.split(".")[-1])}, n=3, cutoff=0.0)
            )
            raise ValueError(
                f"per_layer names '{pattern}', which none of the chosen layers matches; nearest names: {near}"
            )
    return {
        name: dataclasses.replace(method, **next((dict(v) for p, v in per_layer.items() if _matches(p, name)), {}))
        for name in layers
    }


def _matches(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _keep_slow_path(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that does nothing: its presence keeps TransformerEncoderLayer from reading weights past the adapters."""


def _switch_off_fast_paths(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _keep_slow_path not in module._forward_hooks.values():
            module.register_forward_hook(_keep_slow_path)
        if isinstance(module, nn.TransformerEncoder) and "_loratory_nested" not in module.__dict__:
            module.__dict__["_loratory_nested"], module.use_nested_tensor = module.use_nested_tensor, False


def _restore_fast_paths(model: nn.Module) -> None:
    for module in model.modules():
        for key in [k for k, hook in module._forward_hooks.items() if hook is _keep_slow_path]:
            del module._forward_hooks[key]
        if "_loratory_nested" in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop("_loratory_nested")
