"""Claims about the form of an update: its rank, what it can come near to, where its first step lies. Drawn data, seconds each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import loratory as lt
from loratory.catalogue.digits import trained_layer
from loratory.catalogue.properties import Found, adapted, kept_bytes, layer, mean_and_range, small_llama
from loratory.methods.registry import method_class
from loratory.ops.dct import dct_matrix
from loratory.ops.orthogonality import awom, awor

TARGETS = ("full rank", "low rank", "kronecker", "smooth", "shuffled")


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
    """The weights that an adapted layer shall come near to: W + D with |D| of W's own size, or W K + E.

    smooth: D is the matrix of a drawn convolution round the end (5 taps), blurred along both sides by a Gaussian of deviation 2; shuffled:
    the same with rows and columns in drawn orders.
    """
    if target not in TARGETS:
        raise ValueError(f"target is '{target}'; it must be {', '.join(TARGETS)}")
    outputs, inputs = W.shape
    if target == "full rank":
        return W + torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    if target in ("smooth", "shuffled"):
        D = blurred_convolution(inputs, generator)
        if target == "shuffled":
            D = D[torch.randperm(inputs, generator=generator)][:, torch.randperm(inputs, generator=generator)]
        return W + D * (W.norm() / D.norm())
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


def blurred_convolution(size: int, generator: torch.Generator) -> Tensor:
    """Matrix of a drawn convolution of 5 taps round the end, blurred along both sides."""

    def around(taps: Tensor) -> Tensor:
        line = torch.zeros(size).index_add(0, (torch.arange(len(taps)) - len(taps) // 2) % size, taps)
        return torch.stack([line.roll(i) for i in range(size)])

    blur = around(torch.exp(-(torch.arange(-8.0, 9.0) ** 2) / (2 * 2.0**2)))
    return blur @ around(torch.randn(5, generator=generator)) @ blur


def nearest(side: Mapping[str, Any], W: Tensor, goal: Tensor, steps: int, seed: int) -> float:
    """Least relative error |W' - W*| / |W* - W| over the rates, after steps of Adam whose rate falls to zero."""
    errors = []
    for rate in side["rates"]:
        model = layer(W.shape[1], W.shape[0], seed)
        with torch.no_grad():
            model.layer.weight.copy_(W)
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

    def drawn_pair(seed: int) -> tuple[Tensor, Tensor]:
        W = layer(size, size, seed).layer.weight.detach().clone()
        return W, target_weights(target, W, rank, torch.Generator().manual_seed(seed + 1))

    return compared(drawn_pair, first, second, steps, seeds)


def layer_approximation(*, first: Mapping[str, Any], second: Mapping[str, Any], steps: int, seeds: int) -> Found:
    """The same for a layer that was trained in full: of 256 x 256, from digits upright to digits turned."""
    return compared(trained_layer, first, second, steps, seeds)


def compared(
    pair: Callable[[int], tuple[Tensor, Tensor]],
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    steps: int,
    seeds: int,
) -> Found:
    """Error of the first method over that of the second, from a seed's weights to those wanted."""
    ratios, errors = [], {"first": 0.0, "second": 0.0}
    for seed in range(seeds):
        W, goal = pair(seed)
        one = nearest(first, W, goal, steps, seed)
        if "floor" in second:
            S = torch.linalg.svdvals((goal - W).double())
            other = float(S[second["floor"] :].norm() / S.norm())
        else:
            other = nearest(second, W, goal, steps, seed)
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


def cosine_over_fourier(*, size: int, rank: int, seeds: int) -> Found:
    """Energy of a drawn matrix in the largest of its cosine coefficients, over that in as many of its Fourier transform's real numbers.

    Their number is that of a LoRA of this rank. The real numbers: real and imaginary part of one component of each conjugate pair, at
    the weight that makes them coefficients in an orthonormal basis, each chosen by itself.
    """
    ratios, count = [], 2 * size * rank
    C = dct_matrix(size, torch.device("cpu"), torch.float64)
    for seed in range(seeds):
        D = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        F = torch.fft.fft2(D, norm="ortho")
        parts = 2 * torch.cat([F.real, F.imag]).square()  # each stands twice, as its component and the conjugate
        fourier = parts.flatten().sort(descending=True).values / 2
        cosine = (C @ D @ C.T).square().flatten().sort(descending=True).values
        ratios.append(float(cosine[:count].sum() / fourier[: 2 * count].sum()))
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


def mask_orthogonality(*, width: int, fraction: float, seeds: int) -> Found:
    """How two sparse updates disturb each other, places apart against the same places: largest relative difference of AWOR and AWOM."""
    count, found, worst = round(fraction * width * width), [], []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        places = torch.randperm(width * width, generator=generator)[: 2 * count]
        one, same, apart = (
            torch.zeros(width * width).index_copy(0, where, torch.randn(count, generator=generator)).view(width, width)
            for where in (places[:count], places[:count], places[count:])
        )
        measures = [(float(awor(one, each)), float(awom(one, each))) for each in (same, apart)]
        found.append(measures)
        worst.append(max(abs(b / a - 1) for a, b in zip(*measures, strict=True)))
    names = ("AWOR of the same places", "AWOM of the same places", "AWOR of places apart", "AWOM of places apart")
    means = [fmean(each[i][j] for each in found) for i in (0, 1) for j in (0, 1)]
    return {"value": max(worst), **dict(zip(names, means, strict=True))}


def saved(method: str, options: Mapping[str, Any], width: int, tokens: int) -> int:
    """Bytes that a layer keeps for the backward pass."""
    model = adapted(layer(width, width, 0), method_class(method)(**options))
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    return kept_bytes(model, lambda: model(x).sum())


def saved_bytes(*, first: Mapping[str, Any], second: Mapping[str, Any], width: int, tokens: int) -> Found:
    """Bytes kept for the backward pass by one layer: the first method's over the second's."""
    one, other = (saved(side["method"], side.get("options", {}), width, tokens) for side in (first, second))
    return {"value": one / other, "first": float(one), "second": float(other)}


def training_bytes(
    *, first: Mapping[str, Any], second: Mapping[str, Any], width: int, inner: int, tokens: int, weights: bool = False
) -> Found:
    """Percent that a step of AdamW with the first method lies below one with the second, in bytes beside the base's weights, or with them.

    Counted on a Llama of two blocks, all linear layers: numbers that are trained, their gradients and states, what the adapter holds
    beside them, and what is kept for the backward pass, each storage once.
    """

    def measured(side: Mapping[str, Any]) -> dict[str, int]:
        model = small_llama(hidden_size=width, intermediate_size=inner).train()
        base = sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
        lt.adapt(model, method_class(side["method"])(**side.get("options", {})), "all-linear", seed=0)
        held = {t.untyped_storage().data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
        optimizer = torch.optim.AdamW(lt.param_groups(model, lr=1e-3))
        ids = torch.arange(tokens)[None] % 100
        losses: list[Tensor] = []

        def forward() -> None:
            losses.append(model(input_ids=ids, labels=ids).loss)

        kept = kept_bytes(model, forward)
        losses[0].backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.step()
        states = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
        return {
            "adapter": sum(held.values()) - base,
            "gradients, states": gradients + states,
            "kept for the backward pass": kept,
        }

    ours, theirs = measured(first), measured(second)
    if weights:
        base = sum(p.nbytes for p in small_llama(hidden_size=width, intermediate_size=inner).parameters())
        ours, theirs = ({**each, "base": base} for each in (ours, theirs))
    named = {"the first": ours, "the second": theirs}
    parts = {f"{part} of {side}": float(size) for side, sizes in named.items() for part, size in sizes.items()}
    return {"value": 100 * (1 - sum(ours.values()) / sum(theirs.values())), **parts}


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
        layer_approximation,
        cosine_energy,
        cosine_over_fourier,
        first_step_error,
        step_is_projection,
        mask_orthogonality,
        saved_bytes,
        training_bytes,
        tuning_bytes,
        captured_energy,
        folded,
    )
}
