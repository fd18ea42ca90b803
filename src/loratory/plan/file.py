"""How large an adapter's file will be."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from loratory.runtime.layer import copies_of, layers_of, pools_of

NAMES = {  # number format -> its name in safetensors files
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of an adapted model that `save` writes, under their names in the file. Empty for a model of PEFT's."""
    found: dict[str, Tensor] = {}
    for name, layer in layers_of(model).items():
        for adapter in layer.adapters():
            found |= {
                f"layers/{name}/{key}": t for key, t in adapter.tensors().items() if not adapter.tags[key].rebuilt
            }
    for pool in pools_of(model).values():
        found |= {f"shared/{key}": t for key, t in pool.tensors().items() if not pool.tags[key].rebuilt}
    for owner, copies in copies_of(model).items():
        prefix = f"{owner}." if owner else ""
        for name, copy in copies.items():
            if name != "<base>":
                held = [*copy.named_parameters(), *copy.named_buffers()]
                found |= {f"also_train/{prefix}{leaf}": t for leaf, t in held}
    return found


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a safetensors file of these tensors: 8 for the header's length, the header padded to 8, the data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, t in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        size = t.numel() * t.element_size()
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [place, place + size]}
        place += size
    text = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-text // 8) * 8 + place
