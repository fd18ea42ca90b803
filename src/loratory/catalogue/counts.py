"""Claims that are checked by counting: the papers' models at their real shapes on the meta device, without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import loratory as lt
from loratory.methods.registry import method_class
from loratory.runtime.layer import layers_of

ADAM_STATES = 2  # moments for each trained number
WORD = 4  # bytes of a number in float32


def gpt_3() -> nn.Module:
    """GPT-3's attention projections: 96 layers, 12,288 wide. Its other weights are not adapted, and their number is given."""
    return nn.Sequential(*[nn.ModuleDict({part: nn.Linear(12288, 12288) for part in "qkvo"}) for _ in range(96)])


def roberta_base() -> nn.Module:
    from transformers import RobertaConfig, RobertaModel

    return RobertaModel(RobertaConfig())  # the defaults are RoBERTa-base


def gpt_2_medium() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))


def gpt_2_medium_apart() -> nn.Module:
    """GPT-2 medium's attention projections, each a layer of its own: 24 layers, 1,024 wide."""
    return nn.Sequential(*[nn.ModuleDict({part: nn.Linear(1024, 1024) for part in "qkvo"}) for _ in range(24)])


def llama_2_70b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=64, num_key_value_heads=8))


def llama_3_8b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(intermediate_size=14336, num_key_value_heads=8, vocab_size=128256))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt-3": gpt_3,
    "roberta-base": roberta_base,
    "gpt2-medium": gpt_2_medium,
    "gpt2-medium-apart": gpt_2_medium_apart,
    "llama-2-70b": llama_2_70b,
    "llama-3-8b": llama_3_8b,
}


def adapted(model: str, method: str, options: Mapping[str, Any], where: str) -> tuple[int, int]:
    """(numbers that are trained, numbers of the base)."""
    if model not in MODELS:
        raise ValueError(f"there is no model '{model}' to count; there are {', '.join(MODELS)}")
    with torch.device("meta"):
        base = MODELS[model]()
    total = sum(p.numel() for p in base.parameters())
    lt.adapt(base, method_class(method)(**options), where)
    return sum(p.numel() for p in base.parameters() if p.requires_grad), total


def trained(*, model: str, method: str, options: Mapping[str, Any], where: str) -> dict[str, float]:
    """Numbers that are trained."""
    return {"value": float(adapted(model, method, options, where)[0])}


def times_fewer(*, model: str, total: int, method: str, options: Mapping[str, Any], where: str) -> dict[str, float]:
    """Numbers of the whole base over those that are trained."""
    count, _ = adapted(model, method, options, where)
    return {"value": total / count, "trained": float(count), "total": float(total)}


def times_fewer_than(
    *, model: str, other: str, other_options: Mapping[str, Any], method: str, options: Mapping[str, Any], where: str
) -> dict[str, float]:
    """Numbers that another method trains over those that this one does."""
    theirs, _ = adapted(model, other, other_options, where)
    ours, _ = adapted(model, method, options, where)
    return {"value": theirs / ours, "trained": float(ours), "other": float(theirs)}


def spread_per_layer(
    *, models: Mapping[str, str], ranks: Sequence[int], method: str, options: Mapping[str, Any]
) -> dict[str, float]:
    """The most numbers of a layer less the fewest, over models (each with the layers adapted in it) and ranks."""
    found: set[int] = set()
    for model, where in models.items():
        for rank in ranks:
            with torch.device("meta"):
                base = MODELS[model]()
            lt.adapt(base, method_class(method)(**{**options, "rank": rank}), where)
            found |= {
                sum(p.numel() for p in t.trained().values())
                for layer in layers_of(base).values()
                for t in layer.adapters()
            }
    return {"value": float(max(found) - min(found)), "most": float(max(found)), "least": float(min(found))}


def adapter_bytes(*, model: str, method: str, options: Mapping[str, Any], where: str, bytes: int) -> dict[str, float]:
    """Bytes of the trained numbers."""
    return {"value": float(bytes * adapted(model, method, options, where)[0])}


def times_less_state(
    *, model: str, total: int, method: str, options: Mapping[str, Any], where: str
) -> dict[str, float]:
    """Bytes of weights, gradients and Adam's moments: all of the base trained, over the adapter alone."""
    count, _ = adapted(model, method, options, where)
    per_trained = WORD * (1 + ADAM_STATES)  # gradient and moments
    full, ours = total * (WORD + per_trained), total * WORD + count * (WORD + per_trained)
    return {"value": full / ours, "full_bytes": float(full), "adapter_bytes": float(ours)}


def share(*, model: str, method: str, options: Mapping[str, Any], where: str) -> dict[str, float]:
    """Percent of the adapted model's numbers that are trained."""
    count, total = adapted(model, method, options, where)
    return {"value": 100 * count / (total + count), "trained": float(count), "total": float(total)}


COUNTS: dict[str, Callable[..., dict[str, float]]] = {
    each.__name__: each
    for each in (trained, times_fewer, times_fewer_than, spread_per_layer, adapter_bytes, times_less_state, share)
}
