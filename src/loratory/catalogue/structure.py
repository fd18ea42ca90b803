"""Claims about the form of an update: its rank, what it can come near to, where its first step lies. Drawn data, seconds each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import loratory as lt
from loratory.catalogue.properties import Found, adapted, kept_bytes, layer, mean_and_range
from loratory.methods.registry import method_class
from loratory.ops.dct import dct_matrix

TARGETS = ("full rank", "low rank", "kronecker")


def change(model: Any) -> Tensor:
    """W' - W of the only layer (out, in)."""
    W = model.layer.weight
    return model(torch.eye(W.shape[1], dtype=W.dtype)).T - W


def drawn(model: Any, seed: int) -> Any:
    """The model with every trained number drawn anew, so that nothing is at its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator))
    return model


def rank_of_change(*, method: str, options: Mapping[str, Any], inputs: int, outputs: int, seeds: int) -> Found:
    """Smallest numerical rank of W' - W over drawn trained numbers."""
    ranks = []
    for seed in range(seeds):
        model = drawn(adapted(layer(inputs, outputs, seed), method_class(method)(**options), seed), seed)
        with torch.no_grad():
            ranks.append(float(torch.linalg.matrix_rank(change(model).double(), rtol=1e-6)))
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"value": min(ranks), "largest": max(ranks), "trained": float(numbers)}


def target_weights(target: str, W: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The weights that an adapted layer shall come near to: W + D with |D| of W's own size, or W K + E."""
    if target not in TARGETS:
        raise ValueError(f"target is '{target}'; it must be {', '.join(TARGETS)}")
    outputs, inputs = W.shape
    if target == "full rank":
        return W + torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    E = torch.randn(outputs, rank, generator=generator) @ torch.randn(rank, inputs, generator=generator)
    E = E * (W.norm() / E.norm())
    if target == "low rank":
        return W + E
    side = round(inputs ** (1 / 3))
    if side**3 != inputs:
        raise ValueError(f"inputs is {inputs}; a kronecker target needs a cube, such as 64 or 216")
    K = torch.ones(1, 1)
    for _ in range(3):
        K = torch.kron(K, torch.eye(side) + 0.3 * torch.randn(side, side, generator=generator) / side**0.5)
    return W @ K + 0.1 * E


def nearest(side: Mapping[str, Any], target: str, size: int, rank: int, steps: int, seed: int) -> float:
    """Least relative error |W' - W*| / |W* - W| over the rates, after steps of Adam whose rate falls to zero."""
    errors = []
    for rate in side["rates"]:
        model = layer(size, size, seed)
        W = model.layer.weight.detach().clone()
        goal = target_weights(target, W, rank, torch.Generator().manual_seed(seed + 1))
        adapted(model, method_class(side["method"])(**side.get("options", {})), seed)
        optimizer = torch.optim.Adam(lt.param_groups(model, lr=float(rate)))
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            (change(model) + W - goal).square().sum().backward()
            optimizer.step()
            falling.step()
        with torch.no_grad():
            errors.append(float((change(model) + W - goal).norm() / (goal - W).norm()))
    return min(e for e in errors if e == e)


def approximation(
    *,
    target: str,
    size: int,
    rank: int = 0,
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    steps: int,
    seeds: int,
) -> Found:
    """Error of the first method over that of the second, each at its best rate; rank: of the target's low-rank part.

    second = {floor: r}: the least error that any update of rank r can have (Eckart and Young), in place of a second method.
    """
    ratios, errors = [], {"first": 0.0, "second": 0.0}
    for seed in range(seeds):
        one = nearest(first, target, size, rank, steps, seed)
        if "floor" in second:
            W = layer(size, size, seed).layer.weight.detach()
            D = target_weights(target, W, rank, torch.Generator().manual_seed(seed + 1)) - W
            S = torch.linalg.svdvals(D.double())
            other = float(S[second["floor"] :].norm() / S.norm())
        else:
            other = nearest(second, target, size, rank, steps, seed)
        ratios.append(one / other)
        errors["first"] += one / seeds
        errors["second"] += other / seeds
    return {**mean_and_range(ratios), "error of the first": errors["first"], "error of the second": errors["second"]}


def cosine_energy(*, size: int, rank: int, chosen: str, seeds: int) -> Found:
    """Energy of a drawn matrix in as many cosine coefficients as a LoRA of this rank trains, over that in its rank largest singular values.

    chosen: "largest" coefficients, "random" ones, or "paid": the largest third, each location counted as two further numbers.
    """
    ratios = []
    C = dct_matrix(size, torch.device("cpu"), torch.float64)
    count = 2 * size * rank
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        D = torch.randn(size, size, generator=generator, dtype=torch.float64)
        energy = (C @ D @ C.T).square().flatten()
        low = float(torch.linalg.svdvals(D)[:rank].square().sum())
        if chosen == "random":
            kept = energy[torch.randperm(len(energy), generator=generator)[:count]]
        else:
            kept = energy.sort(descending=True).values[: count if chosen == "largest" else count // 3]
        ratios.append(float(kept.sum()) / low)
    return mean_and_range(ratios)


def first_step_error(*, inputs: int, outputs: int, rank: int, seeds: int) -> Found:
    """LoRA-SB's start: distance of its update from Adam's first step, over the least that an update of its rank can have."""
    ratios = []
    for seed in range(seeds):
        model, step = layer(inputs, outputs, seed), 1e-3
        seen, G = gradient_of(model, seed)
        lt.adapt(model, lt.LoRASB(rank=rank, first_step=step), "layer", seed=seed, seen=seen)
        wanted = (-step * G.sign()).double()
        with torch.no_grad():
            error = (change(model).double() - wanted).norm()
        ratios.append(float(error / torch.linalg.svdvals(wanted)[rank:].norm()))
    return mean_and_range(ratios)


def gradient_of(model: Any, seed: int) -> tuple[lt.Collected, Tensor]:
    """What `collect` gathers for a drawn regression, and the layer's gradient by autograd."""
    generator = torch.Generator().manual_seed(seed + 100)
    outputs, inputs = model.layer.weight.shape
    x, y = torch.randn(64, inputs, generator=generator), torch.randn(64, outputs, generator=generator)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    (G,) = torch.autograd.grad(loss(model, (x, y)), [model.layer.weight])
    return lt.collect(model, [(x, y)], loss=loss, where="layer"), G


def step_is_projection(*, inputs: int, outputs: int, rank: int, steps: int, rate: float) -> Found:
    """LoRA-SB under SGD: largest relative distance of a step's change of W from the projection B B^T G A^T A of full fine-tuning's."""
    model = layer(inputs, outputs, 0)
    seen, _ = gradient_of(model, 0)
    lt.adapt(model, lt.LoRASB(rank=rank, first_step=1e-3), "layer", seed=0, seen=seen)
    parts = {name.rpartition(".")[2]: each for name, each in [*model.named_parameters(), *model.named_buffers()]}
    A, B = parts["A"].detach(), parts["B"].detach()
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(64, inputs, generator=generator), torch.randn(64, outputs, generator=generator)
    optimizer = torch.optim.SGD([parts["R"]], lr=rate)
    worst = 0.0
    for _ in range(steps):
        with torch.no_grad():
            before = change(model)
            W = (model.layer.weight + before).clone()
        W.requires_grad_()
        (G,) = torch.autograd.grad((x @ W.T - y).square().mean(), [W])
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            wanted = -rate * (B @ (B.T @ G @ A.T) @ A)
            worst = max(worst, float((change(model) - before - wanted).norm() / wanted.norm()))
    return {"value": worst}


def saved(method: str, options: Mapping[str, Any], width: int, tokens: int) -> int:
    """Bytes that a layer keeps for the backward pass."""
    model = adapted(layer(width, width, 0), method_class(method)(**options))
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    return kept_bytes(model, lambda: model(x).sum())


def saved_bytes(*, first: Mapping[str, Any], second: Mapping[str, Any], width: int, tokens: int) -> Found:
    """Bytes kept for the backward pass by one layer: the first method's over the second's."""
    one, other = (saved(side["method"], side.get("options", {}), width, tokens) for side in (first, second))
    return {"value": one / other, "first": float(one), "second": float(other)}


def masked_gradient(mask: Tensor, p: Tensor) -> None:
    """Set the gradient to 0 outside the mask, in place."""
    if p.grad is not None:
        p.grad.mul_(mask)


def tuning_bytes(*, method: str, options: Mapping[str, Any], blocks: int, width: int, images: int) -> Found:
    """Percent that a step of AdamW on a random ViT lies below masked tuning of its linear layers, in bytes beside the weights.

    Counted: gradients, the optimizer's states, the mask (a byte an entry), and what is kept for the backward pass, each storage once.
    """
    from transformers import ViTConfig, ViTModel

    sizes: dict[str, Any] = {"num_hidden_layers": blocks, "num_attention_heads": width // 64}
    x = torch.randn(images, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def measured(masked: bool) -> tuple[int, int]:
        config = ViTConfig(hidden_size=width, intermediate_size=4 * width, **sizes)
        model: Any = ViTModel(config, add_pooling_layer=False).train()
        if masked:
            model.requires_grad_(False)
            trained = [m.weight.requires_grad_() for m in model.modules() if isinstance(m, nn.Linear)]
            masks = [torch.rand(p.shape) < 0.05 for p in trained]
            for p, mask in zip(trained, masks, strict=True):
                p.register_post_accumulate_grad_hook(partial(masked_gradient, mask))
        else:
            lt.adapt(model, method_class(method)(**options), "layers[.].*", seed=0)
            trained, masks = [p for p in model.parameters() if p.requires_grad], []
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        if not masked:
            lt.drive(model, optimizer, 100, 10)
        losses: list[Tensor] = []
        kept = kept_bytes(model, lambda: losses.append(model(pixel_values=x).last_hidden_state.square().mean()))
        losses[0].backward()
        gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
        optimizer.step()
        states = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
        return gradients + states + sum(mask.nbytes for mask in masks), kept

    (ours, kept), (theirs, held) = measured(False), measured(True)
    return {
        "value": 100 * (1 - (ours + kept) / (theirs + held)),
        "gradients, states, importance": float(ours),
        "kept for the backward pass": float(kept),
        "gradients, states, mask of masked tuning": float(theirs),
        "kept by masked tuning": float(held),
    }


def captured_energy(*, base: str, share: float) -> Found:
    """Percent of a weight's squared singular values that the largest of them, this share of all, sum to: mean over the linear layers."""
    from loratory.train.base import load_base

    model = load_base(base, "AutoModel")[0]
    found: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            S = torch.linalg.svdvals(module.weight.detach().float()).square().double()
            held = 100 * float(S[: round(share * len(S))].sum() / S.sum())
            found.setdefault(name.rpartition(".")[2], []).append(held)
    return {"value": fmean(each for kind in found.values() for each in kind), **{k: fmean(v) for k, v in found.items()}}


def folded(*, channels: int, scale: int, rank: int) -> Found:
    """DSCLoRA on a folded SPAN: its numbers after the merge over those before adapting; convolutions and the outputs' error beside."""
    from loratory.transforms.span import SPAN, fold

    torch.manual_seed(0)
    model = SPAN(channels, scale).eval()
    fold(model)

    def size() -> tuple[int, int]:
        return sum(p.numel() for p in model.parameters()), sum(isinstance(m, nn.Conv2d) for m in model.modules())

    before = size()
    lt.adapt(model, lt.ConvLoRA(rank=rank), "conv")
    drawn(model, 0)
    image = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(0.02)
        wanted = model(image)
        lt.merge(model, keep_base=False)
        error = float((model(image) - wanted).abs().max() / wanted.abs().max())
    after = size()
    return {
        "value": after[0] / before[0],
        "convolutions before": float(before[1]),
        "convolutions after": float(after[1]),
        "relative error of the output": error,
    }


STRUCTURE: dict[str, Callable[..., Found]] = {
    each.__name__: each
    for each in (
        rank_of_change,
        approximation,
        cosine_energy,
        first_step_error,
        step_is_projection,
        saved_bytes,
        tuning_bytes,
        captured_energy,
        folded,
    )
}
