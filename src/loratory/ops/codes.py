"""Numbers as integers of a few bits, symmetric about 0, with one scale for each vector (the last dimension).

q = round(c m / (max|c| + 1e-8)),   c' = q max|c| / m,   m = 2^(bits-1) - 1
"""

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

BITS = range(2, 9)
TINY = 1e-8


def check_bits(bits: object) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(
            f"bits is {bits!r}; it must be an integer from {BITS[0]} to {BITS[-1]}, or None for the numbers as they are"
        )
    if bits not in BITS:
        raise ValueError(
            f"bits is {bits}; it must be from {BITS[0]} to {BITS[-1]}, or None for the numbers as they are"
        )


def coded(c: Float[Tensor, "*stack k"], bits: int) -> tuple[Int8[Tensor, "*stack k"], Float[Tensor, "*stack 1"]]:
    """q and max|c|. Raises ValueError for bits outside 2 to 8."""
    check_bits(bits)
    m, most = 2 ** (bits - 1) - 1, c.abs().amax(-1, keepdim=True)
    return (c * m / (most + TINY)).round().to(torch.int8), most


def decoded(q: Int8[Tensor, "*stack k"], most: Float[Tensor, "*stack 1"], bits: int) -> Float[Tensor, "*stack k"]:
    """c'. Vectors of zeros stay zero."""
    return q * most / (2 ** (bits - 1) - 1)


def packed(q: Int8[Tensor, "*stack k"], bits: int) -> UInt8[Tensor, " bytes"]:
    """All codes without gaps: code by code, the lowest bit first; the last byte is filled up with zeros."""
    places = torch.arange(bits)
    stream = ((q.flatten().int() + 2 ** (bits - 1)).unsqueeze(-1) >> places & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).view(-1, 8)
    return (stream << torch.arange(8)).sum(-1).to(torch.uint8)


def unpacked(data: UInt8[Tensor, " bytes"], shape: tuple[int, ...], bits: int) -> Int8[Tensor, "..."]:
    """`packed`, turned round."""
    count = torch.Size(shape).numel()
    stream = (data.int().unsqueeze(-1) >> torch.arange(8) & 1).flatten()[: count * bits].view(count, bits)
    return ((stream << torch.arange(bits)).sum(-1) - 2 ** (bits - 1)).to(torch.int8).view(shape)
