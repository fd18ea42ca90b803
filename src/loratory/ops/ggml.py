"""The block formats of GGUF files: bytes to numbers, and back for the formats that have a plain rounding.

A row of a matrix is a row of bytes, block after block; d and m are float16. Definitions as in the package gguf (llama.cpp),
which the tests compare with, bit for bit.

    Q4_0, Q5_0  32 numbers: d (q - 8), d (q - 16)      Q4_1, Q5_1  32 numbers: d q + m      Q8_0  32 numbers: d q
    Q4_K, Q5_K  256 numbers in 8 sub-blocks: d s q - m t, s and t of 6 bits                  Q6_K  256 in 16: d s (q - 32), s int8
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

Blocks = UInt8[Tensor, "blocks bytes"]
Numbers = Float32[Tensor, "blocks size"]


class BlockFormat(NamedTuple):
    """How a block of `numbers` numbers lies in `bytes` bytes. pack is None where rounding needs a search of its own."""

    numbers: int
    bytes: int
    unpack: Callable[[Blocks], Numbers]
    pack: Callable[[Numbers], Blocks] | None


def unpack(name: str, rows: UInt8[Tensor, "rows bytes"]) -> Float32[Tensor, "rows in"]:
    """Rows of bytes as numbers."""
    form = FORMATS[name]
    return form.unpack(rows.reshape(-1, form.bytes)).reshape(rows.shape[0], -1)


def pack(name: str, W: Float32[Tensor, "rows in"]) -> UInt8[Tensor, "rows bytes"]:
    """Numbers as rows of bytes, each rounded to the nearest that its block can hold."""
    form = FORMATS[name]
    assert form.pack is not None
    return form.pack(W.reshape(-1, form.numbers)).reshape(W.shape[0], -1)


def _half(b: Blocks) -> Tensor:
    """Two bytes as float16, widened."""
    return b.contiguous().view(torch.float16).float()


def _halves(*columns: Tensor) -> Blocks:
    return torch.cat([c.to(torch.float16).view(torch.uint8) for c in columns], 1)


def _nibbles(b: Blocks) -> Tensor:
    """(blocks, 16) bytes as 32 codes: the low halves first."""
    return torch.cat([b & 15, b >> 4], 1)


def _from_nibbles(q: Tensor) -> Blocks:
    return q[:, :16] | q[:, 16:] << 4


def _fifth_bits(b: Blocks) -> Tensor:
    """4 bytes as 32 bits, at the place of the fifth bit of a code."""
    shifts = torch.arange(8, device=b.device, dtype=torch.uint8)
    return ((b.unsqueeze(-1) >> shifts & 1) << 4).reshape(b.shape[0], 32)


def _from_fifth_bits(q: Tensor) -> Blocks:
    shifts = torch.arange(8, device=q.device, dtype=torch.uint8)
    return ((q >> 4).view(-1, 4, 8) << shifts).sum(-1, dtype=torch.uint8)


def _q4_0(b: Blocks) -> Numbers:
    return _half(b[:, :2]) * (_nibbles(b[:, 2:]).to(torch.int8) - 8)


def _q4_1(b: Blocks) -> Numbers:
    return _half(b[:, :2]) * _nibbles(b[:, 4:]) + _half(b[:, 2:4])


def _q5_0(b: Blocks) -> Numbers:
    return _half(b[:, :2]) * ((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).to(torch.int8) - 16)


def _q5_1(b: Blocks) -> Numbers:
    return _half(b[:, :2]) * (_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])) + _half(b[:, 2:4])


def _q8_0(b: Blocks) -> Numbers:
    return _half(b[:, :2]) * b[:, 2:].contiguous().view(torch.int8)


def _six_bit_scales(b: Blocks) -> tuple[Tensor, Tensor]:
    """12 bytes as 8 scales s and 8 offsets t of 6 bits."""
    first, second, rest = b[:, :4], b[:, 4:8], b[:, 8:]
    s = torch.cat([first & 63, rest & 15 | first >> 6 << 4], 1)
    t = torch.cat([second & 63, rest >> 4 | second >> 6 << 4], 1)
    return s, t


def _scaled(b: Blocks, q: Tensor) -> Numbers:
    """d s q - m t for q (blocks, 8, 32)."""
    s, t = _six_bit_scales(b[:, 4:16])
    return ((_half(b[:, :2]) * s).unsqueeze(-1) * q).sub_((_half(b[:, 2:4]) * t).unsqueeze(-1)).reshape(b.shape[0], 256)


def _q4_k(b: Blocks) -> Numbers:
    qs = b[:, 16:].reshape(-1, 4, 1, 32)
    return _scaled(b, torch.cat([qs & 15, qs >> 4], 2).view(-1, 8, 32))


def _q5_k(b: Blocks) -> Numbers:
    qs = b[:, 48:].reshape(-1, 4, 1, 32)
    fifth = b[:, 16:48].unsqueeze(1) >> torch.arange(8, device=b.device, dtype=torch.uint8).view(1, 8, 1) & 1
    return _scaled(b, torch.cat([qs & 15, qs >> 4], 2).view(-1, 8, 32) | fifth << 4)


def _q6_k(b: Blocks) -> Numbers:
    low = b[:, :128].reshape(-1, 2, 1, 64)
    low = torch.cat([low & 15, low >> 4], 2).view(-1, 8, 32)
    high = b[:, 128:192].reshape(-1, 2, 1, 32) >> torch.tensor([0, 2, 4, 6], device=b.device, dtype=torch.uint8).view(
        1, 1, 4, 1
    )
    q = (low | (high & 3).reshape(-1, 8, 32) << 4).to(torch.int8) - 32
    scales = _half(b[:, 208:]) * b[:, 192:208].contiguous().view(torch.int8)
    return (scales.unsqueeze(-1) * q.view(-1, 16, 16)).reshape(b.shape[0], 256)


def _f16(b: Blocks) -> Numbers:
    return _half(b)


def _bf16(b: Blocks) -> Numbers:
    return b.contiguous().view(torch.bfloat16).float()


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0, 1 / d)


def _extreme(w: Numbers) -> Tensor:
    """The number of largest size in each block, with its sign."""
    return w.gather(1, w.abs().argmax(1, keepdim=True))


def _codes(w: Numbers, d: Tensor, zero: int, most: int) -> Tensor:
    return (w * _inverse(d) + zero + 0.5).floor().clamp(0, most).to(torch.uint8)


def _pack_q4_0(w: Numbers) -> Blocks:
    d = _extreme(w) / -8
    return torch.cat([_halves(d), _from_nibbles(_codes(w, d, 8, 15))], 1)


def _pack_q4_1(w: Numbers) -> Blocks:
    m = w.amin(1, keepdim=True)
    d = (w.amax(1, keepdim=True) - m) / 15
    return torch.cat([_halves(d, m), _from_nibbles(_codes(w - m, d, 0, 15))], 1)


def _pack_q5_0(w: Numbers) -> Blocks:
    d = _extreme(w) / -16
    q = _codes(w, d, 16, 31)
    return torch.cat([_halves(d), _from_fifth_bits(q), _from_nibbles(q & 15)], 1)


def _pack_q5_1(w: Numbers) -> Blocks:
    m = w.amin(1, keepdim=True)
    d = (w.amax(1, keepdim=True) - m) / 31
    q = _codes(w - m, d, 0, 31)
    return torch.cat([_halves(d, m), _from_fifth_bits(q), _from_nibbles(q & 15)], 1)


def _pack_q8_0(w: Numbers) -> Blocks:
    d = w.abs().amax(1, keepdim=True) / 127
    return torch.cat([_halves(d), (w * _inverse(d)).round().to(torch.int8).view(torch.uint8)], 1)


def _pack_f16(w: Numbers) -> Blocks:
    return _halves(w)


def _pack_bf16(w: Numbers) -> Blocks:
    return w.to(torch.bfloat16).view(torch.uint8)


FORMATS: dict[str, BlockFormat] = {
    "BF16": BlockFormat(1, 2, _bf16, _pack_bf16),
    "F16": BlockFormat(1, 2, _f16, _pack_f16),
    "Q4_0": BlockFormat(32, 18, _q4_0, _pack_q4_0),
    "Q4_1": BlockFormat(32, 20, _q4_1, _pack_q4_1),
    "Q4_K": BlockFormat(256, 144, _q4_k, None),
    "Q5_0": BlockFormat(32, 22, _q5_0, _pack_q5_0),
    "Q5_1": BlockFormat(32, 24, _q5_1, _pack_q5_1),
    "Q5_K": BlockFormat(256, 176, _q5_k, None),
    "Q6_K": BlockFormat(256, 210, _q6_k, None),
    "Q8_0": BlockFormat(32, 34, _q8_0, _pack_q8_0),
}
