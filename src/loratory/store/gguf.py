"""llama.cpp's adapter files: a LoRA beside a GGUF base, loaded with `--lora`. Written with the package `gguf`."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loratory.runtime.low_rank import Nearest
from loratory.runtime.state import require_adapter
from loratory.runtime.ties import tied_places
from loratory.runtime.where import head_names
from loratory.sites import Site

FILE = "adapter.gguf"
_MERGED = "; write the merged model instead (to='merged'), and convert that"


class Family(NamedTuple):
    """A model family of llama.cpp whose linear weights stand in its files as they are, but for the order of q and k rows."""

    name: str
    halves_apart: bool = False  # transformers rotates by halves, llama.cpp by pairs: its q and k rows are interleaved


FAMILIES: dict[str, Family] = {  # model_type of the config
    "gemma": Family("gemma"),
    "gemma2": Family("gemma2"),
    "gpt2": Family("gpt2"),
    "llama": Family("llama", halves_apart=True),
    "mistral": Family("llama", halves_apart=True),
    "phi3": Family("phi3"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "starcoder2": Family("starcoder2"),
}


def save_gguf(model: Any, folder: Path, name: str, nearest: Nearest) -> None:
    """Write `adapter.gguf`: general.type adapter, adapter.lora.alpha, and lora_a, lora_b for each weight's name.

    llama.cpp scales by alpha / rank of the layer; our scale stands in lora_b. A token embedding's lora_a is transposed, as it
    expects. Raises ValueError for a family, a layer or a trained copy that the format has no place for.
    """
    try:
        from gguf import MODEL_ARCH_NAMES, GGUFType, GGUFWriter, LlamaFileType, get_tensor_name_map
    except ImportError:
        raise ImportError(
            "writing a GGUF adapter needs the package gguf; install it with `pip install 'loratory[gguf]'`"
        ) from None
    family, config = _family(model)
    copies = [n for n in require_adapter(model, name).copied if n not in nearest.taken]
    if copies:
        raise ValueError(
            f"adapter '{name}' also trains '{copies[0]}' in full, which llama.cpp's adapter files cannot hold{_MERGED}"
        )
    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == family.name)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    tensors: dict[str, Tensor] = {}
    alpha = float(Counter(f.A.shape[-2] for f in nearest.factors.values()).most_common(1)[0][0])
    for layer, site in nearest.sites.items():
        stored = names.get_name(layer)
        if stored is None or site.stack or site.kind == "conv":
            raise ValueError(
                f"layer '{layer}' ({site.kind}) has no place in llama.cpp's {family.name} files; leave it out of the adapter{_MERGED}"
            )
        _refuse_tied_head(model, layer)
        B, A, *_ = nearest.factors[layer]
        B = _interleaved(B, site, stored, config) if family.halves_apart else B
        B = B * (A.shape[-2] / alpha)
        tensors[f"{stored}.weight.lora_a"] = A.mT if stored == "token_embd" else A
        tensors[f"{stored}.weight.lora_b"] = B
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"tensor '{key}' of adapter '{name}' holds NaN or infinity, so it was not written; go back to the last good checkpoint"
            )
    writer = GGUFWriter(folder / FILE, family.name)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_file_type(LlamaFileType.ALL_F32)
    for key, tensor in tensors.items():
        writer.add_tensor(key, tensor.detach().float().cpu().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _family(model: Any) -> tuple[Family, Any]:
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(
            f"a {type(model).__name__} (model_type {kind!r}) cannot be written as a GGUF adapter; allowed are {', '.join(FAMILIES)}{_MERGED}"
        )
    return FAMILIES[kind], config


def _interleaved(B: Tensor, site: Site, stored: str, config: Any) -> Tensor:
    """The rows of a q or k projection in llama.cpp's order: those of a head's two halves in turn."""
    part = stored.split(".")[-1]
    if part not in ("attn_q", "attn_k"):
        return B
    heads = config.num_attention_heads
    if part == "attn_k":
        heads = getattr(config, "num_key_value_heads", None) or heads
    return B.reshape(heads, 2, site.outputs // heads // 2, -1).transpose(1, 2).reshape(B.shape)


def _refuse_tied_head(model: nn.Module, layer: str) -> None:
    if layer not in head_names(model):
        return
    for places in tied_places(model).values():
        if f"{layer}.weight" in places:
            raise ValueError(
                f"layer '{layer}' shares its weight with '{next(p for p in places if p != f'{layer}.weight')}', so a GGUF base holds it once and an "
                f"adapter of the head alone would find no weight; leave it out of the adapter{_MERGED}"
            )
