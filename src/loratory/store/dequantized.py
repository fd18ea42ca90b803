"""A quantised base written as a plain full-precision model, with the active adapters merged into it unrounded."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratory.runtime.layer import is_ours, layers_of
from loratory.runtime.merge import (
    QUANTIZED_TOLERANCE,
    MergeCheck,
    compare,
    merged_weight,
    random_batch,
    refuse_shared,
    run,
    tolerance_of,
)
from loratory.sites.quantized import quantized_sites


def write_dequantized(model: Any, folder: Path, *, probe: Any, tolerance: float | None) -> MergeCheck:
    """Write the folder, load it again, and compare both on a probe batch. The whole model is in memory in full precision meanwhile.

    Raises RuntimeError if the two differ by more than the tolerance; ValueError if no probe is known for the model.
    """
    batch = probe if probe is not None else random_batch(model)
    if batch is None:
        raise ValueError(f"there is no probe batch for a {type(model).__name__}; pass one with probe=")
    refuse_shared(model, {name: layer for name, layer in layers_of(model).items() if layer.active}, False)
    cls: Any = type(model).__mro__[1]
    config = type(model.config)(
        **{k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    )
    plain = full_precision(model)
    dtype = next((t.dtype for t in plain.values() if t.is_floating_point()), torch.float32)
    with torch.device("meta"):
        fresh = cls(config)
    fresh.load_state_dict(plain, assign=True)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    fresh.save_pretrained(folder)
    del fresh, plain
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            before = run(model, batch).double()
            again = cls.from_pretrained(folder, dtype=dtype).to(before.device).eval()
            after = run(again, batch).double()
    finally:
        model.train(training)
    limit = tolerance_of(dtype, tolerance)
    if tolerance is None and any(site.rounds_inputs for site in quantized_sites(model).values()):
        limit = QUANTIZED_TOLERANCE
    check = compare(before, after, str(dtype).removeprefix("torch."), "the model's output", limit)
    if not check.relative <= check.tolerance:
        raise RuntimeError(f"{check}; nothing was written. Pass tolerance= if this error is acceptable")
    return check


def full_precision(model: Any) -> dict[str, Tensor]:
    """The plain model's state dict: every quantised weight read, every adapted one merged."""
    layers = layers_of(model)
    quantized = quantized_sites(model)
    out: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        if is_ours(key):
            continue
        if not any(key.startswith(name + ".") and key != f"{name}.bias" for name in quantized):
            out[key] = tensor
    with torch.no_grad():
        for name in {*quantized, *layers}:
            layer = layers.get(name)
            site = layer.site if layer is not None else quantized[name]
            W = merged_weight(layer) if layer is not None and layer.active and not layer.merged else site.read()
            shape = _stored_shape(site)
            W = W.t() if site.one_hot or site.kind == "conv1d-transposed" else W.reshape(shape)
            out[f"{name}.weight"] = W.detach().to(site.dtype).contiguous()
    return out


def _stored_shape(site: Any) -> tuple[int, ...]:
    return site.shape if site.rounds else tuple(site.weight.shape)
