"""Claims that are checked by a small numeric experiment on drawn data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

import loratory as lt
from loratory.methods.registry import method_class

Found = dict[str, float]


def layer(inputs: int, outputs: int, seed: int) -> Any:
    """One linear layer with drawn weights, inside a model that adapters can be put on."""
    generator = torch.Generator().manual_seed(seed)
    model: Any = nn.Sequential()
    model.add_module("layer", nn.Linear(inputs, outputs, bias=False))
    with torch.no_grad():
        model.layer.weight.copy_(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)
    return model


def adapted(model: Any, method: Any, seed: int = 0) -> Any:
    lt.adapt(model, method, "layer", seed=seed)
    return model


def learn(
    rank: int, *, rslora: bool, alpha: float, width: int, tokens: int, steps: int, rate: float, seed: int
) -> tuple[float, float]:
    """(norm of the factors' gradient, loss) after some steps of SGD towards drawn weights at a distance of the base's own size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    distance = torch.randn(width, width, generator=generator) / width**0.5
    model = layer(width, width, seed)
    with torch.no_grad():
        y = x @ (model.layer.weight + distance).T
    adapted(model, lt.LoRA(rank=rank, alpha=alpha, rslora=rslora), seed)
    numbers = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(numbers, lr=rate)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = 0.5 * (model(x) - y).square().sum(-1).mean()
        value.backward()
        return value.detach()

    for _ in range(steps):
        loss()
        optimizer.step()
    last = float(loss())
    return float(torch.stack([p.grad.norm() for p in numbers if p.grad is not None]).norm()), last


def mean_and_range(values: Sequence[float]) -> Found:
    """Mean over seeds, with their standard deviation and ends."""
    return {
        "value": fmean(values),
        "deviation": stdev(values) if len(values) > 1 else 0.0,
        "least": min(values),
        "most": max(values),
    }


def gradient_norm_ratio(*, low: int, high: int, seeds: int, **setting: Any) -> Found:
    """Gradient norm at a high rank over that at a low one."""
    return mean_and_range([learn(high, seed=s, **setting)[0] / learn(low, seed=s, **setting)[0] for s in range(seeds)])


def loss_ratio(*, rank: int, seeds: int, **setting: Any) -> Found:
    """Loss with rsLoRA's scale over that with LoRA's."""
    pairs = [[learn(rank, rslora=kind, seed=s, **setting)[1] for kind in (True, False)] for s in range(seeds)]
    return mean_and_range([ours / plain for ours, plain in pairs])


def rslora_scale(*, alpha: float, ranks: Sequence[int]) -> Found:
    """Distance of the used weight from W + alpha / sqrt(rank) B A, the largest over the ranks."""
    worst = 0.0
    for rank in ranks:
        model = adapted(layer(256, 256, rank), lt.LoRA(rank=rank, alpha=alpha, rslora=True), rank)
        factors = {name.rpartition(".")[2]: p for name, p in model.named_parameters() if p.requires_grad}
        generator = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            for p in factors.values():
                p.copy_(torch.randn(p.shape, generator=generator))
            right = alpha / rank**0.5 * (factors["B"] @ factors["A"])
            used = model(torch.eye(256)).T - model.layer.weight
        worst = max(worst, float((used - right).abs().max() / right.abs().max()))
    return {"value": worst}


def dora_layer(width: int, inner: int, rank: int) -> tuple[Any, Tensor]:
    model = layer(inner, width, 0)
    before = model.layer.weight.detach().clone()
    return adapted(model, lt.DoRA(rank=rank)), before


def dora_start(*, width: int, inner: int, rank: int) -> Found:
    """Distance of the adapted weight from the base's at the start, over its range."""
    model, before = dora_layer(width, inner, rank)
    with torch.no_grad():
        used = model(torch.eye(inner)).T
    return {"value": float((used - before).abs().max() / before.abs().max())}


def dora_row_lengths(*, width: int, inner: int, rank: int, steps: int, rate: float) -> Found:
    """Largest relative distance of a row's length from its m, after training towards other weights."""
    model, before = dora_layer(width, inner, rank)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, inner, generator=generator)
    y = x @ (before + torch.randn(width, inner, generator=generator) / inner**0.5).T
    numbers = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(numbers, lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    m = next(p for p in numbers if p.ndim == 1).detach()
    with torch.no_grad():
        lengths = model(torch.eye(inner)).T.norm(dim=-1)
    moved = float((lengths - before.norm(dim=-1)).abs().max())
    return {"value": float(((lengths - m.abs()) / m.abs()).abs().max()), "largest_change_of_a_length": moved}


def small_llama(**sizes: Any) -> Any:
    """A Llama with two blocks and drawn weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=4, vocab_size=100, **sizes))


def kept_storages(compute: Callable[[], Any]) -> list[Tensor]:
    """One tensor of each storage that a computation keeps for the backward pass."""
    kept: dict[int, Tensor] = {}  # the tensors stay alive, so that no address is used twice

    def keep(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        compute()
    return list(kept.values())


def kept_bytes(model: nn.Module, compute: Callable[[], Any]) -> int:
    """Bytes that a computation keeps for the backward pass beside the model's parameters and buffers, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    storages = [t.untyped_storage() for t in kept_storages(compute)]
    return sum(storage.nbytes() for storage in storages if storage.data_ptr() not in own)


def times_less_kept(*, method: str, width: int, inner: int, tokens: int, rank: int) -> Found:
    """Bytes kept for the backward pass with LoRA, over those with another method of the same rank: a small Llama, and one layer."""
    options: dict[str, Any] = {"rank": rank}
    every = {"LoRA": lt.LoRA(rank=rank), method: method_class(method)(**options)}
    found: Found = {}
    ids, x = torch.arange(tokens)[None] % 100, torch.zeros(tokens, width)
    for name, made in every.items():
        model = small_llama(hidden_size=width, intermediate_size=inner)
        lt.adapt(model, made, "all-linear", seed=0)
        found[f"bytes with {name}"] = float(kept_bytes(model, partial(model.train(), input_ids=ids)))
        alone = adapted(layer(width, inner, 0), made)
        found[f"bytes of one layer with {name}"] = float(kept_bytes(alone, partial(alone, x)))
    return {"value": found["bytes with LoRA"] / found[f"bytes with {method}"], **found}


def merged_work(*, method: str, options: Mapping[str, Any]) -> Found:
    """Multiplications and additions of a forward pass, merged over base; and those of the unmerged adapter."""
    from torch.utils.flop_counter import FlopCounterMode

    model = small_llama(hidden_size=64, intermediate_size=128).eval()
    ids = torch.arange(32)[None]

    def work() -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids)
        return float(counter.get_total_flops())

    base = work()
    lt.adapt(model, method_class(method)(**options), "all-linear")
    apart = work()
    lt.merge(model)
    return {"value": work() / base, "unmerged": apart / base}


def kept_beside_factors(*, width: int, tokens: int, rank: int, bases: int) -> Found:
    """Numbers that NOLA's layer keeps from the forward to the backward pass beside input, narrow product and weight, which LoRA's keeps,
    too, over those of coefficients, seeds and factors."""

    def kept(method: Any) -> int:
        model = adapted(layer(width, width, 0), method)
        x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))
        return sum(t.untyped_storage().nbytes() // t.element_size() for t in kept_storages(lambda: model(x)))

    factors = 2 * rank * width
    more = kept(lt.NOLA(rank=rank, bases=bases)) - (kept(lt.LoRA(rank=rank)) - factors)
    allowed = 2 * bases + 6 + factors
    return {"value": more / allowed, "numbers": float(more), "over_one_basis": more / (bases * rank * width)}


PROPERTIES: dict[str, Callable[..., Found]] = {
    each.__name__: each
    for each in (
        gradient_norm_ratio,
        loss_ratio,
        rslora_scale,
        dora_start,
        dora_row_lengths,
        times_less_kept,
        merged_work,
        kept_beside_factors,
    )
}
