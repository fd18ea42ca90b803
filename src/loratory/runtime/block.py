"""The body of a model with virtual tokens before its text; the contract stands in sites/block.py.

The body's class is swapped, as a layer's is: its forward puts a prompt before the input embeddings and cuts the prompt's outputs
off again. Its attention blocks carry a forward pre-hook that hands them the prefix as a cache that holds it already. The prefix is
made inside the attention block, so that recomputing the block (gradient checkpointing) makes it again.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loratory.ops.masks import additive, causal_mask, document_numbers
from loratory.runtime.cache import PrefixedKeys, prompted_cache
from loratory.runtime.layer import LAYER, Adapter, Layer, layers_of, restore_class, subclass, swap_class
from loratory.sites.block import BlockSite, parameters

PER_TOKEN = (
    "last_hidden_state",
    "hidden_states",
    "attentions",
    "router_logits",
)  # outputs that have an entry for each token


def seat(site: BlockSite) -> Layer:
    """The layer of a body, made where there is none yet: the body's class is swapped and its attention blocks get their hooks."""
    module: Any = site.module
    if LAYER not in module._modules:
        layer = Layer(site)
        swap_class(module, adapted_body(module.__class__))
        for block, attention in enumerate(site.attentions.values()):
            hook = Prefixes(layer, block, parameters(attention))
            attention.register_forward_pre_hook(hook, with_kwargs=True)
        module.add_module(LAYER, layer)
    return module._modules[LAYER]


def unseat(layer: Layer) -> None:
    """Undo `seat`."""
    for attention in layer.site.attentions.values():  # type: ignore[attr-defined]
        for key in [k for k, hook in attention._forward_pre_hooks.items() if isinstance(hook, Prefixes)]:
            del attention._forward_pre_hooks[key], attention._forward_pre_hooks_with_kwargs[key]
    del layer.site.module._modules[LAYER]
    restore_class(layer.site.module)


def refuse_two_blocks(model: nn.Module, names: Sequence[str], mix: Sequence[float] | None) -> None:
    """Virtual tokens cannot be weighed, and two sets of them would both stand first."""
    for layer in layers_of(model).values():
        here = [name for name in names if name in layer] if layer.site.kind == "block" else []
        if len(here) > 1:
            raise ValueError(
                f"adapters {' and '.join(map(repr, here))} both put virtual tokens into the model; activate one of them"
            )
        if here and mix is not None and mix[names.index(here[0])] != 1.0:
            raise ValueError(
                f"mix holds {mix[names.index(here[0])]} for adapter '{here[0]}', whose virtual tokens cannot be weighed; give it 1.0"
            )


@functools.cache
def adapted_body(cls: Any) -> type[nn.Module]:
    """A subclass of a body's class, with its name, whose forward puts the active adapter's virtual tokens before the text."""
    names = tuple(inspect.signature(cls.forward).parameters)[1:]

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer = self.loratory
        if not layer.active:
            return cls.forward(self, *args, **kwargs)
        call = dict(zip(names, args, strict=False)) | kwargs
        return run_body(layer, functools.partial(cls.forward, self), call)

    return subclass(cls, {"forward": forward}, adapted_body)


Call = dict[str, Any]  # the arguments of a body, by name


def run_body(layer: Layer, forward: Callable[..., Any], call: Call) -> Any:
    """The body's output for the real tokens."""
    t: Any = layer.active[0]
    site: Any = layer.site
    if any(key.startswith("cu_seq_lens") for key in call):
        raise RuntimeError(
            f"{type(t.method).__name__}: the rows are packed for flash attention (cu_seq_lens), in which virtual tokens have no place; "
            "use a collator that pads"
        )
    P = t.method.prompt(t)
    return run_shifted(site, forward, call, t.method.tokens) if P is None else run_prompted(site, forward, call, t, P)


def run_shifted(site: Any, forward: Callable[..., Any], call: Call, tokens: int) -> Any:
    """The body with positions moved up; the attention blocks add the prefix."""
    x = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
    past = call.get("past_key_values")
    seen = 0 if past is None else past.get_seq_length()
    if "position_ids" in site.takes:
        if call.get("position_ids") is None:
            call["position_ids"] = default_positions(site, call, x, seen)
        call["position_ids"] = call["position_ids"] + tokens
        check_places(site, call["position_ids"], x.shape[1], tokens)
    return forward(**call)


def run_prompted(site: Any, forward: Callable[..., Any], call: Call, t: Adapter, P: Tensor) -> Any:
    """The body with the prompt before the input embeddings, unless the cache has seen it."""
    n, ids, x = P.shape[0], call.pop("input_ids", None), call.get("inputs_embeds")
    x = site.embedding(ids) if x is None else x
    batch, length = x.shape[:2]
    causal = site.causal
    use_cache = call.get("use_cache")
    use_cache = getattr(site.config, "use_cache", False) if use_cache is None else use_cache
    past = call.get("past_key_values")
    cache = prompted_cache(site.config, past, n, t) if causal and (use_cache or past is not None) else None
    first = cache is None or cache.first
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if mask is None and cache is None and causal and positions is not None:
        mask = packed_mask(positions, n, x)
    elif mask is not None:
        seen = 0 if cache is None else int(cache.real.get_seq_length())
        extend = functools.partial(prompted_mask, n=n, first=first, seen=seen, site=site)
        if isinstance(mask, dict):
            mask = {kind: extend(m, kind=kind) for kind, m in mask.items()}
        else:
            sliding = cache is not None and any(cache.real.is_sliding)
            mask = extend(mask, kind="sliding_attention" if sliding else "full_attention")
        if cache is not None:
            cache.whole = not isinstance(mask, Tensor) or mask.dim() == 4
    if positions is not None:
        positions = positions + n
        if first:
            positions = torch.cat([torch.arange(n, device=x.device).expand(*positions.shape[:-1], n), positions], -1)
    check_places(site, positions, length + (0 if cache is None else cache.real.get_seq_length()), n)
    call |= {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    if first:
        x = torch.cat([P.to(x.dtype).expand(batch, -1, -1), x], 1)
        if call.get("token_type_ids") is not None:
            call["token_type_ids"] = F.pad(call["token_type_ids"], (n, 0))
    call["inputs_embeds"] = x
    call = {k: v for k, v in call.items() if v is not None or k in site.takes}
    return_dict = call.pop("return_dict", None)
    out = forward(**call, return_dict=True)
    if cache is not None and out.get("past_key_values") is cache:
        out.past_key_values = cache.real
    if first:
        cut(out, site, n, batch)
    plain = getattr(site.config, "return_dict", True) if return_dict is None else return_dict
    return out if plain else out.to_tuple()


def cut(out: Any, site: Any, n: int, batch: int) -> None:
    """Take the outputs of the first n tokens away."""
    for key in PER_TOKEN:
        value = out.get(key)
        if isinstance(value, Tensor):
            out[key] = value[:, n:]
        elif value is not None:
            out[key] = tuple(None if v is None else cut_one(key, v, n, batch) for v in value)
    if out.get("pooler_output") is not None:
        out["pooler_output"] = site.module.pooler(out["last_hidden_state"])


def cut_one(key: str, value: Tensor, n: int, batch: int) -> Tensor:
    if key == "attentions":
        return value[:, :, n:]  # (batch, heads, query, key): the keys stay
    if key == "router_logits" and value.dim() == 2:
        return value.unflatten(0, (batch, -1))[:, n:].flatten(0, 1)
    return value[:, n:]


def prompted_mask(mask: Any, *, n: int, first: bool, seen: int, site: Any, kind: str) -> Any:
    """A mask over the real tokens, extended to the n virtual ones before them; `seen` real tokens are in the cache."""
    if mask is None:
        return None
    known = isinstance(mask, Tensor) and mask.dim() in (2, 4)
    if not known or kind not in ("full_attention", "sliding_attention"):
        raise RuntimeError(
            f"the attention mask is a {type(mask).__name__} for {kind}, which virtual tokens cannot be put before; give a tensor of 2 or 4 "
            "dimensions, load the model with attn_implementation='sdpa', or use PrefixTuning"
        )
    if mask.dim() == 2:
        return F.pad(mask, (n, 0), value=1)
    places = torch.arange(n + seen + mask.shape[2], device=mask.device)
    rows = places if first else places[n + seen :]
    window = site.config.sliding_window if kind == "sliding_attention" else len(places)
    visible = places[:n] > rows[:, None] - window  # (rows, virtual tokens)
    if site.causal:
        visible = visible & (places[:n] <= rows[:, None])
    visible = visible if mask.dtype == torch.bool else additive(visible, mask.dtype)
    if first and site.causal:
        mask = F.pad(mask, (0, 0, n, 0), value=False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
    elif first:  # they see what any real token sees
        mask = torch.cat([mask.amax(2, keepdim=True).expand(-1, -1, n, -1), mask], 2)
    return torch.cat([visible.expand(*mask.shape[:2], -1, -1), mask], 3)


def packed_mask(positions: Tensor, n: int, x: Tensor) -> Tensor | None:
    """The mask of rows that hold several documents (positions that restart): each of them sees the prompt. None for other rows."""
    documents = document_numbers(positions)
    if not bool((documents != 0).any()):
        return None
    seen = F.pad(causal_mask(positions.shape[-1], documents=documents), (n, 0, n, 0), value=True)
    ahead = causal_mask(n + positions.shape[-1], device=x.device)
    return additive(seen & ahead, x.dtype)[:, None].expand(x.shape[0], -1, -1, -1)


def default_positions(site: Any, call: Call, x: Tensor, seen: int) -> Tensor:
    """The positions that the body itself would give."""
    if site.counter is not None:
        end = "s_embeds" if call.get("input_ids") is None else "_ids"
        return getattr(site.counter, f"create_position_ids_from_input{end}")(x, site.counter.padding_idx)
    return (torch.arange(x.shape[1], device=x.device) + seen).unsqueeze(0)


def check_places(site: Any, positions: Tensor | None, length: int, tokens: int) -> None:
    """Refuse positions beyond a learned table of them."""
    if site.places is None or length + tokens <= site.places[1]:
        return
    start, places = site.places
    if positions is None or int(positions.max()) >= start + places:
        raise ValueError(
            f"a text of {length} tokens and {tokens} virtual ones need {length + tokens} positions, but {type(site.module).__name__} has "
            f"{places}; shorten the text to {places - tokens} tokens, or take fewer virtual ones"
        )


@dataclass(eq=False)
class Prefixes:
    """Forward pre-hook of one attention block: hands it a cache that holds the prefix already."""

    layer: Layer
    block: int
    names: tuple[str, ...]  # of the forward's arguments

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[Any, ...], Call] | None:
        if not self.layer.active:
            return None
        (t,) = self.layer.active
        own = t.method.prefix(t, self.block)
        if own is None:
            return None
        call = dict(zip(self.names, args, strict=False)) | kwargs
        K, V = own
        x, past, mask = call["hidden_states"], call.get("past_key_values"), call.get("attention_mask")
        length, n = x.shape[1], K.shape[-2]
        causal = call.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        end = None
        if mask is None and causal and length > 1:
            seen = 0 if past is None else int(past.get_seq_length(module.layer_idx))
            end = seen + length
            visible = F.pad(causal_mask(length, seen, device=x.device), (n, 0), value=True)
            call["attention_mask"] = additive(visible, x.dtype)[None, None]
        elif isinstance(mask, Tensor) and mask.dim() == 4:
            call["attention_mask"] = F.pad(mask, (n, 0), value=True if mask.dtype == torch.bool else 0)
        elif mask is not None or module.config._attn_implementation not in ("eager", "sdpa"):
            raise RuntimeError(
                f"block {self.block}: {type(t.method).__name__} needs attention that takes a full mask; load the model with "
                "attn_implementation='sdpa' or 'eager'"
            )
        call["past_key_values"] = PrefixedKeys(past, K, V, end, self.block)
        return (), call
