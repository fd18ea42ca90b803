"""Coefficients that a file holds as integers of a few bits, beside one scale for each vector."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from loratory.methods.method import Method
from loratory.ops.codes import check_bits, coded, decoded, packed, unpacked

SCALE = ".scale"
Record = dict[str, dict[str, Any]]  # key -> bits, shape and dtype


def check_codable(method: Method, name: str, bits: int | None) -> None:
    """Refuse bits that no codes have, or for a method without coefficients."""
    if bits is None:
        return
    check_bits(bits)
    if not method.coefficients:
        raise ValueError(
            f"adapter '{name}' ({type(method).__name__}) has no coefficients that a file could hold in {bits} bits; save it without bits="
        )


def encode(tensors: dict[str, Tensor], keys: Iterable[str], bits: int) -> Record:
    """Put codes and scales in the place of these tensors; returns what `decode` must know of them."""
    record: Record = {}
    for key in keys:
        c = tensors[key]
        q, most = coded(c if c.dtype == torch.float64 else c.float(), bits)
        record[key] = {"bits": bits, "shape": list(c.shape), "dtype": str(c.dtype).removeprefix("torch.")}
        tensors[key], tensors[key + SCALE] = packed(q, bits), most
    return record


def decode(tensors: dict[str, Tensor], record: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the rounded numbers back. Raises KeyError, TypeError, ValueError, AttributeError for a record of other tensors."""
    for key, told in record.items():
        check_bits(told["bits"])
        *stack, _ = told["shape"]
        if tensors[key].numel() != -(-torch.Size(told["shape"]).numel() * told["bits"] // 8) or tensors[
            key + SCALE
        ].shape != (*stack, 1):
            raise ValueError(f"'{key}' is not as long as {told['bits']} bits for {told['shape']}")
        q = unpacked(tensors[key], tuple(told["shape"]), told["bits"])
        tensors[key] = decoded(q, tensors.pop(key + SCALE), told["bits"]).to(getattr(torch, told["dtype"]))
