"""Claims that are checked by counting: the papers' models at their real shapes on the meta device, without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import loratory as lt
from loratory.methods.registry import method_class
from loratory.runtime.layer import layers_of
from loratory.runtime.where import select

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


def llama_3_8b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(intermediate_size=14336, num_key_value_heads=8, vocab_size=128256))


def llama_2(hidden: int, inner: int, layers: int, heads: int, kv: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv}
    return LlamaForCausalLM(LlamaConfig(hidden_size=hidden, intermediate_size=inner, **sizes))


def llama_3_2_3b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8}
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=3072, intermediate_size=8192, head_dim=128, vocab_size=128256, **sizes)
    )


def gemma_2_9b() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes: dict[str, Any] = {"num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8}
    return Gemma2ForCausalLM(Gemma2Config(hidden_size=3584, intermediate_size=14336, head_dim=256, **sizes))


def sdxl_attention() -> nn.Module:
    """The attention projections of SDXL's network: 10 blocks 640 wide and 60 blocks 1,280 wide, with a context of 2,048."""

    def block(width: int) -> nn.Module:
        inside = {f"self_{part}": nn.Linear(width, width) for part in ("q", "k", "v", "out")}
        context = {f"cross_{part}": nn.Linear(width, width) for part in ("q", "out")}
        return nn.ModuleDict(inside | context | {f"cross_{part}": nn.Linear(2048, width) for part in ("k", "v")})

    return nn.Sequential(*[block(640) for _ in range(10)], *[block(1280) for _ in range(60)])


def vit(width: int, layers: int, heads: int) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    sizes: dict[str, Any] = {"num_hidden_layers": layers, "num_attention_heads": heads}
    return ViTModel(ViTConfig(hidden_size=width, intermediate_size=4 * width, **sizes), add_pooling_layer=False)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt-3": gpt_3,
    "roberta-base": roberta_base,
    "gpt2-medium": gpt_2_medium,
    "gpt2-medium-apart": gpt_2_medium_apart,
    "llama-2-7b": lambda: llama_2(4096, 11008, 32, 32, 32),
    "llama-2-70b": lambda: llama_2(8192, 28672, 80, 64, 8),
    "llama-3-8b": llama_3_8b,
    "llama-3.2-3b": llama_3_2_3b,
    "gemma-2-9b": gemma_2_9b,
    "sdxl-attention": sdxl_attention,
    "vit-base": lambda: vit(768, 12, 12),
    "vit-huge": lambda: vit(1280, 32, 16),
}


def on_meta(model: str) -> nn.Module:
    """One of MODELS without weights. Raises ValueError for another name."""
    if model not in MODELS:
        raise ValueError(f"there is no model '{model}' to count; there are {', '.join(MODELS)}")
    with torch.device("meta"):
        return MODELS[model]()


def adapted(model: str, method: str, options: Mapping[str, Any], where: str) -> tuple[int, int]:
    """(numbers that are trained, numbers of the base)."""
    base = on_meta(model)
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


def spread_per_layer(
    *, models: Mapping[str, str], ranks: Sequence[int], method: str, options: Mapping[str, Any]
) -> dict[str, float]:
    """The most numbers of a layer less the fewest, over models (each with the layers adapted in it) and ranks."""
    found: set[int] = set()
    for model, where in models.items():
        for rank in ranks:
            base = on_meta(model)
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


def below_masked(*, model: str, method: str, options: Mapping[str, Any], where: str) -> dict[str, float]:
    """Percent that a method's training lies below masked tuning of the same layers, in bytes beside the weights and activations.

    Masked tuning: gradient and Adam's moments of every entry, and a mask of a byte each. The method: the same of what it trains, and what
    its footprint says it keeps, and needs for a moment at the largest layer.
    """
    count, _ = adapted(model, method, options, where)
    made = method_class(method)(**options)
    shapes = [module.weight.shape for module in select(on_meta(model), where).values()]  # type: ignore[union-attr]
    needs = [made.footprint(*shape) for shape in shapes]  # type: ignore[misc, arg-type]
    per_trained = WORD * (1 + ADAM_STATES)
    masked = sum(shape.numel() for shape in shapes) * (per_trained + 1)  # type: ignore[operator, misc]
    kept, moment = sum(each.kept for each in needs), max(each.scratch for each in needs)
    ours = count * per_trained + WORD * (kept + moment)
    return {"value": 100 * (1 - ours / masked), "masked_bytes": float(masked), "adapter_bytes": float(ours)}


def share(*, model: str, method: str, options: Mapping[str, Any], where: str) -> dict[str, float]:
    """Percent of the adapted model's numbers that are trained."""
    count, total = adapted(model, method, options, where)
    return {"value": 100 * count / (total + count), "trained": float(count), "total": float(total)}


def times_fewer_updates(*, model: str, rank: int, eta: float, steps: int, where: str) -> dict[str, float]:
    """Numbers that LoRA updates over a run, each step counted anew, over those of LaMDA at the same rank."""
    lora, _ = adapted(model, "lora", {"rank": rank}, where)
    at_start, _ = adapted(model, "lamda", {"rank": rank, "eta": eta}, where)
    cores, _ = adapted(model, "lora-xs", {"rank": rank}, where)  # rank * rank numbers a layer
    column = (at_start - cores) // rank
    method = lt.LaMDA(rank=rank, eta=eta)
    columns = sum(rank - method.frozen_columns(step, steps, rank) for step in range(1, steps + 1))
    ours = steps * cores + columns * column
    found = {"lora": steps * lora, "lamda": ours, "lamda at the first step": at_start, "lamda at the last step": cores}
    return {"value": steps * lora / ours} | {name: float(number) for name, number in found.items()}


def numbers_over(*, model: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, float]:
    """Trained numbers of the first method over those of the second. A side: method, options, where."""
    one, other = (adapted(model, side["method"], side.get("options", {}), side["where"])[0] for side in (first, second))
    return {"value": one / other, "first": float(one), "second": float(other)}


def share_of_layers(*, model: str, where: str) -> dict[str, float]:
    """Percent of the base's numbers that lie in the weights of the chosen layers, all of which a fused low-rank update changes."""
    base = on_meta(model)
    total = sum(p.numel() for p in base.parameters())
    chosen = set(select(base, where))
    inside = sum(module.weight.numel() for name, module in base.named_modules() if name in chosen)  # type: ignore[operator,union-attr]
    return {"value": 100 * inside / total, "changed": float(inside), "total": float(total)}


COUNTS: dict[str, Callable[..., dict[str, float]]] = {
    each.__name__: each
    for each in (
        trained,
        times_fewer,
        adapter_bytes,
        times_less_state,
        below_masked,
        share,
        times_fewer_updates,
        numbers_over,
        share_of_layers,
        spread_per_layer,
    )
}
