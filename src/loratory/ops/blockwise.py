"""Matrices stored in 4 or 8 bits, in blocks along their rows: NF4 with doubly quantised scales, and int8.

Rows can be read one by one, so that a product never needs the whole matrix. Every tensor of a stored matrix holds integers:
`model.to(dtype)` casts floating tensors, and a scale that is rounded changes the weight. Real numbers are kept as their bits.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Float32, Int8, Int32, UInt8
from torch import Tensor

# QLoRA, arXiv 2305.14314, appendix E: means of the normal distribution's 16 equally likely pieces, 0 and both ends among them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_BLOCK, INT8_BLOCK = 64, 128  # numbers that share a scale
SCALE_BLOCK = 256  # NF4 scales that share a step and a mean


def pack_nf4(W: Float[Tensor, "out in"]) -> dict[str, Tensor]:
    """codes (out, in / 2) with two 4-bit codes a byte, the first in the high bits; one int8 scale for 64 numbers of a row, about the
    mean of 256 scales and in steps of their own. 4.13 bits a number where rows are multiples of 64.
    """
    W = W.float()
    scales, steps = _pack_scales(_largest(W, NF4_BLOCK))
    at = torch.tensor(NF4, device=W.device)
    codes = torch.bucketize(_divided(W, _unpack_scales(scales, steps), NF4_BLOCK), (at[1:] + at[:-1]) / 2).to(
        torch.uint8
    )
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=7)
    return {"codes": codes[:, ::2] << 4 | codes[:, 1::2], "scales": scales, "steps": steps}


def unpack_nf4(stored: Mapping[str, Tensor], rows: slice | Tensor, columns: int) -> Float32[Tensor, "rows in"]:
    codes: UInt8[Tensor, "rows bytes"] = stored["codes"][rows]
    values = torch.tensor(NF4, device=codes.device)
    pairs = torch.cartesian_prod(values, values)  # one look-up gives both numbers of a byte
    W = pairs.index_select(0, codes.reshape(-1).int()).view(codes.shape[0], -1)[:, :columns]
    return _multiply_(W, _unpack_scales(stored["scales"], stored["steps"])[rows], NF4_BLOCK)


def pack_int8(W: Float[Tensor, "out in"]) -> dict[str, Tensor]:
    """codes (out, in) in -127 .. 127; one float32 scale for 128 numbers of a row. 8.25 bits a number."""
    W = W.float()
    scales = _largest(W, INT8_BLOCK) / 127
    codes = _divided(W, scales, INT8_BLOCK).round_().clamp_(-127, 127).to(torch.int8)
    return {"codes": codes, "scales": scales.view(torch.int32)}


def unpack_int8(stored: Mapping[str, Tensor], rows: slice | Tensor, columns: int) -> Float32[Tensor, "rows in"]:
    return _multiply_(stored["codes"][rows].float(), stored["scales"][rows].view(torch.float32), INT8_BLOCK)


def _largest(W: Float[Tensor, "out in"], block: int) -> Float[Tensor, "out blocks"]:
    """The largest absolute value of each block; the last one of a row may be short."""
    padded = torch.nn.functional.pad(W, (0, -W.shape[1] % block))
    return padded.view(W.shape[0], -1, block).abs().amax(-1)


def _pack_scales(scales: Float32[Tensor, "out blocks"]) -> tuple[Int8[Tensor, "out blocks"], Int32[Tensor, "groups 2"]]:
    """Each scale as int8 steps from the mean of its group of 256; step and mean as the bits of float32."""
    flat = scales.reshape(-1)
    short = -flat.numel() % SCALE_BLOCK
    groups = torch.cat([flat, flat[-1:].expand(short)]).view(-1, SCALE_BLOCK)
    means = groups.mean(-1, keepdim=True)
    steps = (groups - means).abs().amax(-1, keepdim=True) / 127
    codes = ((groups - means) / steps.where(steps > 0, 1)).round().clamp(-127, 127).to(torch.int8)
    return codes.reshape(-1)[: flat.numel()].view(scales.shape), torch.cat([steps, means], 1).view(torch.int32)


def _unpack_scales(
    scales: Int8[Tensor, "out blocks"], steps: Int32[Tensor, "groups 2"]
) -> Float32[Tensor, "out blocks"]:
    group = torch.arange(scales.numel(), device=scales.device) // SCALE_BLOCK
    step, mean = steps.view(torch.float32)[group].unbind(-1)
    return torch.addcmul(mean, scales.reshape(-1), step).view(scales.shape)


def _divided(W: Float[Tensor, "out in"], scales: Float[Tensor, "out blocks"], block: int) -> Float[Tensor, "out in"]:
    return _multiply_(W.clone(), 1 / scales.where(scales != 0, 1), block)


def _multiply_(W: Float[Tensor, "out in"], scales: Float[Tensor, "out blocks"], block: int) -> Float[Tensor, "out in"]:
    """Multiply each block with its scale, in place."""
    whole = W.shape[1] // block * block
    if whole == W.shape[1] and W.is_contiguous():
        W.view(W.shape[0], -1, block).mul_(scales.unsqueeze(-1))
        return W
    for i in range(scales.shape[1]):
        W[:, i * block : (i + 1) * block].mul_(scales[:, i : i + 1])
    return W
