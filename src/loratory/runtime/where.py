"""Where a method acts: presets, names, regular expressions and predicates, all of them predicates in the end."""

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn

from loratory.runtime.layer import is_ours
from loratory.sites import Bare, is_supported, known_parameters, target
from loratory.sites.find import site_class
from loratory.sites.vision import reads_images

Predicate = Callable[[str, nn.Module], bool]
Where = str | Iterable[str] | Predicate

PRESETS = ("all-linear", "attention", "conv", "embedding", "experts", "mlp")

ALIASES: dict[str, str] = {  # what people paste from elsewhere -> our name
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "loraplus_lr_ratio": "lr_ratio",
    "target_modules": "where",
    "target_parameters": "parameters",
    "lora_target": "where",
    "exclude_modules": "exclude",
    "modules_to_save": "also_train",
    "additional_target": "also_train",
    "layers_to_transform": "blocks",
    "num_virtual_tokens": "tokens",
    "encoder_hidden_size": "hidden",
}


def resolve_aliases(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings under our names; one setting under two names is an error."""
    out: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value in given.items():
        name = ALIASES.get(key, key)
        if name in out:
            raise ValueError(f"'{key}' and '{origin[name]}' are the same setting ({name}); give it once")
        out[name], origin[name] = value, key
    return out


def select(
    model: nn.Module, where: Where, *, exclude: Where | None = None, blocks: int | Iterable[int] | None = None
) -> dict[str, nn.Module | Bare]:
    """The layers that `where` names and `exclude` does not, by name, in model order.

    A string is a preset, a name or comma-separated names (matched from the end, at dots), or a regular expression for the whole
    name. A list holds presets and names. A predicate is called with (name, module). `blocks`: only these numbered blocks.
    Bare parameters with known axes (expert stacks, MultiheadAttention's projections) have names, too; a predicate sees modules
    only. all-linear: linear layers but the output head, and MultiheadAttention's projections; attention and mlp are parts of it;
    experts: the expert stacks.
    """
    everything = _everything(model)
    chosen = _match(model, where, everything, "where")
    if exclude is not None:
        dropped = _match(model, exclude, everything, "exclude")
        chosen = {name: each for name, each in chosen.items() if name not in dropped}
    if blocks is not None:
        wanted = {blocks} if isinstance(blocks, int) else set(blocks)
        found = {_block(name) for name in chosen}
        if missing := wanted - found:
            raise ValueError(
                f"blocks holds {sorted(missing)}, but the chosen layers lie in blocks {sorted(b for b in found if b is not None)}"
            )
        chosen = {name: each for name, each in chosen.items() if _block(name) in wanted}
    if not chosen:
        examples = [name for name, each in everything.items() if _can_be_adapted(each)][:5]
        raise ValueError(
            f"no layer matches where={where!r}{f' without exclude={exclude!r}' if exclude is not None else ''}; "
            + (
                f"layers of this model are, for example: {', '.join(examples)}"
                if examples
                else "this model has no layer that can be adapted"
            )
        )
    return {name: each if isinstance(each, Bare) else target(model, name) for name, each in chosen.items()}


def named_parameters(model: nn.Module, named: Iterable[str] | Mapping[str, str] | None) -> dict[str, Bare]:
    """The bare parameters that `parameters` names (from the end, at dots), with the axes it gives or the known ones."""
    if isinstance(named, str):
        named = [part.strip() for part in named.split(",")]
    axes: Mapping[str, str | None] = named if isinstance(named, Mapping) else dict.fromkeys(named or ())
    if not axes:
        return {}
    all_names = [n for n, _ in model.named_parameters(remove_duplicate=False) if not is_ours(n)]
    out: dict[str, Bare] = {}
    for key, given in axes.items():
        found = [n for n in all_names if n == key or n.endswith(f".{key}")]
        if not found:
            near = get_close_matches(key, {*all_names, *(n.split(".")[-1] for n in all_names)}, n=3, cutoff=0.0)
            raise ValueError(
                f"parameters names '{key}', which no parameter of the model is called; nearest names: {', '.join(near)}"
            )
        for name in found:
            bare = target(model, name, given)
            assert isinstance(bare, Bare)
            out[name] = bare
    return {n: out[n] for n in all_names if n in out}


def _everything(model: nn.Module) -> dict[str, Any]:
    """Modules and the bare parameters with known axes, by name, in model order."""
    known = known_parameters(model)
    out: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not is_ours(name):
            out[name] = module
            inside = f"{name}." if name else ""
            out |= {n: known[n] for leaf in module._parameters if (n := inside + leaf) in known}
    return out


def _can_be_adapted(each: nn.Module | Bare) -> bool:
    return isinstance(each, Bare) or is_supported(each)


def select_body(
    model: Any,
    where: Where,
    reads: str = "text",
    *,
    exclude: Where | None = None,
    blocks: int | Iterable[int] | None = None,
) -> dict[str, nn.Module]:
    """The body of a transformers model, by name; `where` may name another one (the text or image part of a model of several)."""
    if exclude is not None or blocks is not None:
        raise ValueError(
            "the method acts on the whole model, so exclude= and blocks= have nothing to leave out; drop them"
        )
    if where not in ("all-linear", "all"):
        chosen = select(model, where)
        if len(chosen) > 1:
            raise ValueError(
                f"the method acts on one body, but where={where!r} names {len(chosen)} modules ({', '.join(list(chosen)[:3])}); leave where= out"
            )
        return {name: module for name, module in chosen.items() if isinstance(module, nn.Module)}
    body, config = getattr(model, "base_model", None), getattr(model, "config", None)
    if not isinstance(body, nn.Module) or config is None:
        raise TypeError(
            f"the model is a {type(model).__name__}, but the method puts virtual tokens into a transformers model; "
            "use a method that acts on layers"
        )
    part = "vision_model" if reads == "images" else "language_model"
    if config.get_text_config() is not config and not config.is_encoder_decoder:
        raise ValueError(
            f"a {type(model).__name__} has several parts; name the one that reads {reads} with where=, for example where='{part}'"
        )
    if reads == "images" and not reads_images(body) and reads_images(model):  # its `base_model` is a part of the body
        body = model
    return {next(name for name, module in model.named_modules() if module is body): body}


def _match(model: nn.Module, where: Where, everything: dict[str, Any], field: str) -> dict[str, Any]:
    if callable(where):
        return {n: module for n, module in everything.items() if isinstance(module, nn.Module) and where(n, module)}
    if isinstance(where, str):
        text = where.strip()
        if text == "all":
            text = "all-linear"
        if text in PRESETS:
            return _preset(model, text, everything)
        names = [part.strip() for part in text.split(",")]
        if all(re.fullmatch(r"[\w.-]+", part) for part in names):
            return _by_names(model, names, everything, field)
        try:
            pattern = re.compile(text)
        except re.error as e:
            raise ValueError(
                f"{field}={where!r} is no regular expression ({e}); give a preset ({', '.join(PRESETS)}), names or a valid one"
            ) from None
        return {
            name: each
            for name, each in everything.items()
            if pattern.fullmatch(name) and (field == "exclude" or _can_be_adapted(each))
        }
    if isinstance(where, Iterable):
        return _by_names(model, list(where), everything, field)
    raise TypeError(
        f"{field} is a {type(where).__name__}; allowed are a preset, names, a regular expression or a predicate (name, module) -> bool"
    )


def _by_names(model: nn.Module, names: list[str], everything: dict[str, Any], field: str) -> dict[str, Any]:
    found: set[str] = set()
    for key in names:
        if not isinstance(key, str):
            raise TypeError(f"{field} holds {key!r}; each entry must be a layer name or a preset")
        if key in ("all", *PRESETS):
            found |= set(_preset(model, "all-linear" if key == "all" else key, everything))
            continue
        matched = [name for name in everything if ends_with(name, [key])]
        if not matched:
            bare = [n for n, _ in model.named_parameters() if not is_ours(n) and ends_with(n, [key])]
            if bare and field == "where":
                target(model, bare[0])  # raises, saying what it is and how to choose it
            last = {name.split(".")[-1] for name, each in everything.items() if _can_be_adapted(each)}
            near = get_close_matches(key, last | set(everything), n=3, cutoff=0.0)
            raise ValueError(
                f"{field} names '{key}', which no layer of the model is called; nearest names: {', '.join(near)}"
            )
        found |= set(matched)
    return {name: module for name, module in everything.items() if name in found}


def _preset(model: Any, preset: str, everything: dict[str, Any]) -> dict[str, Any]:
    kinds = {name: _kind(each) for name, each in everything.items()}
    if preset in ("conv", "experts"):
        return {name: everything[name] for name, kind in kinds.items() if kind == preset}
    if preset == "embedding":
        of_input = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        return {
            name: everything[name]
            for name, kind in kinds.items()
            if kind == "embedding" and of_input in (None, everything[name])
        }
    head = head_names(model)
    linear = [
        name
        for name, kind in kinds.items()
        if kind in ("linear", "conv1d-transposed") and not any(name == h or name.startswith(h + ".") for h in head)
    ]
    if preset == "all-linear":
        return {name: everything[name] for name in linear}
    attention = [name for name in linear if any(_is_attention(a, everything[a]) for a in _ancestors(name))]
    if preset == "attention":
        return {name: everything[name] for name in attention}
    return {name: everything[name] for name in linear if _block(name) is not None and name not in set(attention)}  # mlp


def _kind(each: nn.Module | Bare) -> str:
    if isinstance(each, Bare):
        return "linear" if each.tensor.dim() == 2 else "experts"
    site = site_class(each)
    return "" if site is None else site.kind


def head_names(model: Any) -> list[str]:
    """The output head of a transformers model: what stands beside its `base_model`, or its output embeddings.

    Of a model for a task that has no `base_model` of its own, the linear layers among its children.
    """
    body = getattr(model, "base_model", None)
    heads: list[str] = []
    if isinstance(body, nn.Module) and body is not model:
        inside = set(map(id, body.modules()))
        heads = [
            name
            for name, child in model.named_children()
            if not is_ours(name) and id(child) not in inside and any(True for _ in child.parameters())
        ]
    elif body is not None and body is model and "For" in type(model).__name__:  # CLIP's and SigLIP's vision towers
        heads = [name for name, child in model.named_children() if isinstance(child, nn.Linear)]
    if hasattr(model, "get_output_embeddings"):
        try:
            out = model.get_output_embeddings()
        except (AttributeError, NotImplementedError):  # models without one
            out = None
        heads += [
            name for name, module in model.named_modules() if out is not None and module is out and name not in heads
        ]
    return heads


def ends_with(name: str, keys: Iterable[str]) -> bool:
    """Whether a name is one of these, or ends with one at a dot."""
    return any(name == key or name.endswith("." + key) for key in keys)


def _is_attention(name: str, module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() or "attn" in name.split(".")[-1].lower()


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _block(name: str) -> int | None:
    """The number of the repeated block a layer lies in: the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
