"""What a kernel takes for a moment inside, where no operation shows it: rules found by measuring torch's CPU kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def workspace(func: Any, args: Sequence[Any], out: Any) -> int:
    """Bytes beside the outputs.

    A convolution copies input and weight into an order of its own, runs, and copies the output back: max(x + w, y). Its backward
    pass likewise: g + x for the weight's gradient, else max(g + w, dx). Kernels of one number need no other order. Channels that
    are filled up to a multiple of 8 or 16, as some processors want them, are not counted.
    """
    if func is aten.convolution.default:
        x, w = args[:2]
        return 0 if _is_pointwise(w) else max(_bytes(x) + _bytes(w), _bytes(out))
    if func is aten.convolution_backward.default:
        g, x, w = args[:3]
        if _is_pointwise(w):
            return 0
        to_input, to_weight, _ = args[-1]
        return _bytes(g) + _bytes(x) if to_weight else max(_bytes(g) + _bytes(w), _bytes(x) if to_input else 0)
    return 0


def _is_pointwise(w: Tensor) -> bool:
    return all(size == 1 for size in w.shape[2:])


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()
