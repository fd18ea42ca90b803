"""Merging: the adapted weight written into the layer, checked by a probe before and after."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loratory.runtime.layer import COPIES, Layer, copies_of, drop_pools, layers_of, restore_class
from loratory.runtime.mode import in_mode
from loratory.runtime.norms import release_norms
from loratory.runtime.route import rest, route_layers
from loratory.runtime.seat import unseat
from loratory.runtime.shards import refuse_sharded
from loratory.runtime.state import State, refuse_in_rows, set_state, state_of, unwrap
from loratory.runtime.ties import join, part, say_ties, tied_places
from loratory.sites import Site
from loratory.sites.quantized import Quantized

TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
QUANTIZED_TOLERANCE = 2e-2  # writing into a quantised weight rounds it


@dataclass(frozen=True)
class MergeCheck:
    """The error of a merge, measured on a probe."""

    maximum: float  # largest absolute difference of the outputs
    relative: float  # the same over the range of the outputs
    tolerance: float  # allowed relative error
    dtype: str
    probe: str  # what was run: "model", or the worst layer's name

    def __str__(self) -> str:
        return (
            f"merge check on {self.probe} ({self.dtype}): maximum error {self.maximum:.3g}, "
            f"{self.relative:.3g} of the output's range (allowed {self.tolerance:g})"
        )


def merge(
    model: nn.Module, *, probe: Any = None, keep_base: bool = True, untie: bool = False, tolerance: float | None = None
) -> MergeCheck:
    """Write W' of the active adapters into the weights: W + sum m_i (W'_i - W), computed in float32 or wider.

    probe: a batch (mapping of keywords, tuple of arguments or a tensor) that runs before and after; without it a fixed random
    batch for transformers models, otherwise random inputs layer by layer. keep_base=True keeps the base weights, so that
    `unmerge` and `detach` restore their bits; False leaves the plain model without any adapter.
    Writing into a quantised layer rounds the merged weight to what it can hold: that error is part of the check.
    untie=True parts a weight that two modules share (and says so in model.config); otherwise merging one is refused, unless both
    adapters make the same of it (LoRA that PEFT tied), which keeps the tie.
    Raises RuntimeError if merged already, if the check fails (the model is then as before) or memory is short; ValueError if no
    adapter is active or a method cannot be merged.
    """
    model = unwrap(model)
    state = state_of(model)
    if state.merged:
        raise RuntimeError(
            f"the model is merged already with {', '.join(state.merged)}; call loratory.unmerge(model) first"
        )
    refuse_in_rows(model, "merging")
    if not state.active:
        raise ValueError(
            f"no adapter is active; choose among {', '.join(state.adaptations)} with loratory.use(model, name)"
        )
    refuse_sharded(
        model,
        "no process holds a whole weight to merge into",
        "save the adapter and merge it in one process (`loratory merge`)",
    )
    layers = {name: layer for name, layer in layers_of(model).items() if layer.active}
    for name, layer in layers.items():
        for t in layer.active:
            if not t.method.mergeable:
                raise ValueError(
                    f"layer '{name}': {type(t.method).__name__} changes more than a weight, so it cannot be merged"
                )
    together = {} if untie else _together(model, layers)
    refuse_shared(
        model, {name: layer for name, layer in layers.items() if not {name} & {*together, *together.values()}}, untie
    )
    _need_room(layers, keep_base)
    if untie:
        state.parted = part(model, [layer.site.weight_name for layer in layers.values()])
    with in_mode(model, training=False), torch.no_grad():
        check = _merge_checked(model, state, layers, together, probe, tolerance)
    say_ties(model, state.tied)
    if keep_base:
        state.merged = state.active
    else:
        _strip(model, state)
    return check


def unmerge(model: nn.Module) -> None:
    """Take the merged weights out again: the base's own bits return, and the adapters run beside them as before."""
    model = unwrap(model)
    state = state_of(model)
    if not state.merged:
        raise RuntimeError("the model is not merged; there is nothing to unmerge")
    refuse_sharded(
        model, "the base weights that were kept beside the merged ones cannot return", "unmerge it first, then shard it"
    )
    put_back(model, state, layers_of(model))
    state.merged = ()


def merged_weight(layer: Layer) -> Tensor:
    """W + sum m_i (W'_i - W) of one layer, in float32 or wider."""
    W = layer.site.read().detach()
    W = W if W.dtype == torch.float64 else W.float()
    if len(layer.active) == 1 and float(layer.mix[0]) == 1.0:
        return layer.active[0].method.weight(layer.active[0], W)
    out = W.clone()
    for m, t in zip(layer.mix.tolist(), layer.active, strict=True):
        out += m * (t.method.weight(t, W) - W)
    return out


def random_batch(model: Any) -> dict[str, Tensor] | None:
    """A small random batch for a transformers model, the same at every call; None for a model whose input is not known."""
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        return None
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if main == "input_ids" and getattr(text, "vocab_size", None):
        ids = torch.randint(0, text.vocab_size, (2, 16), generator=generator).to(device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = ids[:, :8]
        return batch
    if main == "pixel_values" and getattr(config, "image_size", None):
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {
            main: torch.randn(2, getattr(config, "num_channels", 3), size, size, generator=generator).to(
                device, model.dtype
            )
        }  # type: ignore[call-overload]
    return None


def run(model: nn.Module, batch: Any) -> Tensor:
    """The main output of the model on a probe batch: logits, or the first tensor it returns."""
    if isinstance(batch, Mapping):
        out = model(**batch)
    elif isinstance(batch, tuple | list):
        out = model(*batch)
    else:
        out = model(batch)
    out = out.logits if hasattr(out, "logits") else out
    if isinstance(out, Mapping):
        out = next(v for v in out.values() if isinstance(v, Tensor))
    return out if isinstance(out, Tensor) else out[0]


def _merge_checked(
    model: nn.Module,
    state: State,
    layers: dict[str, Layer],
    together: dict[str, str],
    probe: Any,
    tolerance: float | None,
) -> MergeCheck:
    batch = probe if probe is not None else random_batch(model)
    before = None if batch is None else run(model, batch).double()
    plain = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    limit = max(
        (_tolerance(layer.site, tolerance) for layer in layers.values()), default=tolerance_of(plain, tolerance)
    )
    worst = MergeCheck(0.0, 0.0, limit, "", "model")
    try:
        for name, layer in layers.items():
            if name in together:
                continue
            site, group = layer.site, [layer, *(layers[n] for n, first in together.items() if first == name)]
            x = _layer_input(site) if batch is None else None
            y = None if x is None else site.run(x).double()
            W = merged_weight(layer)
            if not bool(torch.isfinite(W).all()):
                raise RuntimeError(
                    f"layer '{name}': the merged weight holds NaN or infinity, so nothing was merged; the adapter is broken"
                )
            for each in group:
                each.unmerged = each.site.snapshot()
            site.write(W)
            for each in group:
                rest(each)
            if y is not None and x is not None:
                check = compare(
                    y, site.run(x).double(), stored_as(site), f"layer '{name}'", _tolerance(site, tolerance)
                )
                worst = check if check.relative >= worst.relative else worst
        if batch is not None and before is not None:
            kinds = sorted({stored_as(layer.site) for layer in layers.values()}) or [_name(plain)]
            worst = compare(before, run(model, batch).double(), ", ".join(kinds), "the model's output", limit)
        if not worst.relative <= worst.tolerance:
            out = (
                "Write a full-precision model instead (loratory.export(model, folder, dequantize=True))"
                if any(layer.site.rounds for layer in layers.values())
                else "Merge in a wider dtype (load the base in float32)"
            )
            raise RuntimeError(
                f"{worst}; the merge was undone. {out}, serve the adapter unmerged, or pass tolerance= if this error is acceptable"
            )
    except BaseException:
        put_back(model, state, layers)
        raise
    return worst


def compare(before: Tensor, after: Tensor, dtype: str, what: str, tolerance: float) -> MergeCheck:
    """The difference of two outputs, over the range of the first."""
    maximum = float((before - after).abs().max())
    span = float(before.max() - before.min())
    relative = maximum / span if span > 0 else (0.0 if maximum == 0 else float("inf"))
    return MergeCheck(maximum, relative, tolerance, dtype, what)


def stored_as(site: Site) -> str:
    """The dtype of a layer's weight, or its packing."""
    return site.packing if isinstance(site, Quantized) else _name(site.dtype)


def tolerance_of(dtype: torch.dtype, given: float | None) -> float:
    """The allowed relative error of a merge in this dtype: the given one, or the usual one."""
    return TOLERANCES.get(dtype, 1e-5) if given is None else given


def _tolerance(site: Site, given: float | None) -> float:
    return QUANTIZED_TOLERANCE if site.rounds and given is None else tolerance_of(site.dtype, given)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layer_input(site: Site) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if site.one_hot:
        return torch.randint(0, site.inputs, (32,), generator=generator).to(site.device)
    if site.kind == "conv":
        m = site.module
        size = [max(2 * d * (k - 1) + 1, 8) for k, d in zip(m.kernel_size, m.dilation, strict=True)]
        return torch.randn(2, m.in_channels, *size, generator=generator).to(site.device, site.dtype)
    return torch.randn(*site.stack, 8, site.inputs, generator=generator).to(site.device, site.dtype)


def put_back(model: nn.Module, state: State, layers: dict[str, Layer]) -> None:
    """Give these layers the base's weights again, and let the active adapters run beside them."""
    for layer in layers.values():
        layer.restore()
    route_layers(layers, state.active, state.mix)
    join(model, state.parted)
    state.parted = {}
    say_ties(model, state.tied)


def refuse_shared(model: nn.Module, layers: dict[str, Layer], untie: bool) -> None:
    """Refuse to merge a weight that another module uses too."""
    if untie:
        return
    weights = {layer.site.weight_name: name for name, layer in layers.items()}
    for names in tied_places(model).values():
        adapted = [n for n in names if n in weights]
        if adapted:
            other = next(n for n in names if n != adapted[0]).removesuffix(".weight")
            raise ValueError(
                f"layer '{weights[adapted[0]]}' shares its weight with '{other}', so merging would change both; "
                "pass untie=True to give it a weight of its own, or leave the layer out of the adapter"
            )


def _together(model: nn.Module, layers: dict[str, Layer]) -> dict[str, str]:
    """Layers that share their weight with one before them, of which they make the same."""
    owners = {layer.site.weight_name: name for name, layer in layers.items()}
    found: dict[str, str] = {}
    for names in tied_places(model).values():
        if not set(names) <= owners.keys() or any(isinstance(layers[owners[n]].site, Quantized) for n in names):
            continue
        first, *others = ((owners[n], layers[owners[n]]) for n in names)
        with torch.no_grad():
            W = first[1].site.stored(merged_weight(first[1]))
            alike = [
                torch.allclose(W, layer.site.stored(merged_weight(layer)), rtol=1e-5, atol=1e-6) for _, layer in others
            ]
        found |= {name: first[0] for name, _ in others} if all(alike) else {}
    return found


def _need_room(layers: dict[str, Layer], keep_base: bool) -> None:
    need: dict[torch.device, int] = {}
    for layer in layers.values():
        device = layer.site.device
        need[device] = need.get(device, 0) + layer.site.stored_bytes
    for device, size in need.items():
        free = _free_memory(device)
        if free is not None and size > 0.9 * free:
            raise RuntimeError(
                f"merging keeps the base weights beside the merged ones: {size / 2**20:.0f} MiB on {device}, but {free / 2**20:.0f} MiB are free; "
                "free memory, or merge in a process of its own with `loratory merge`"
            )


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo", encoding="ascii") as f:
            return next((int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable")), None)
    return None


def _strip(model: nn.Module, state: State) -> None:
    """Leave the plain model: merged weights stay, adapters and kept originals go."""
    for layer in layers_of(model).values():
        unseat(layer)
    drop_pools(model, state.adaptations)
    for owner in copies_of(model):
        del model.get_submodule(owner)._modules[COPIES]
    release_norms(model)
    for n, p in model.named_parameters():
        p.requires_grad_(state.trainable.get(n, True))
    set_state(model, None)
    restore_class(model)
