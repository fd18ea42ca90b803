"""SPAN, the small super-resolution network that DSCLoRA adapts, and the folding of its three-fold convolutions into plain ones."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from loratory.runtime.state import is_adapted

MEAN, RANGE, BLOCKS = (0.4488, 0.4371, 0.4040), 255.0, 6


class Conv3XC(nn.Module):
    """A 3 x 3 convolution as it is trained: 1 x 1, 3 x 3, 1 x 1 with twice the channels inside, beside a 1 x 1 skip.

    The input is padded before the first 1 x 1, so its bias stands on the border too and `folded` is exact.
    """

    def __init__(self, inputs: int, outputs: int, gain: int = 2) -> None:
        super().__init__()
        self.sk = nn.Conv2d(inputs, outputs, 1)
        inner, last = gain * inputs, gain * outputs
        self.conv = nn.Sequential(nn.Conv2d(inputs, inner, 1), nn.Conv2d(inner, last, 3), nn.Conv2d(last, outputs, 1))

    def forward(self, x: Float[Tensor, "batch in h w"]) -> Float[Tensor, "batch out h w"]:
        return self.conv(F.pad(x, (1, 1, 1, 1))) + self.sk(x)

    def folded(self) -> nn.Conv2d:
        """The plain convolution: K = W3 W2 W1 at each tap, and the skip at the centre."""
        first, middle, last = self.conv
        W1, W2, W3 = first.weight.flatten(1), middle.weight, last.weight.flatten(1)  # type: ignore[union-attr,operator]
        with torch.no_grad():
            K = torch.einsum("op,pqhw,qi->oihw", W3, W2, W1)  # type: ignore[arg-type]
            K[:, :, 1, 1] += self.sk.weight.flatten(1)
            bias = W3 @ (W2.sum((2, 3)) @ first.bias + middle.bias) + last.bias + self.sk.bias  # type: ignore[operator,union-attr]
            plain = nn.Conv2d(K.shape[1], K.shape[0], 3, padding=1).to(K)
            plain.weight.copy_(K)
            plain.bias.copy_(bias)  # type: ignore[union-attr]
        return plain.train(self.training)


class SPAB(nn.Module):
    """A block: (c3(silu(c2(silu(c1 x)))) + x) * (sigmoid of it - 1/2). Gives the output, silu(c1 x) and the attention map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c1_r, self.c2_r, self.c3_r = (Conv3XC(channels, channels) for _ in range(3))

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> tuple[Tensor, Tensor, Tensor]:
        first = F.silu(self.c1_r(x))
        third = self.c3_r(F.silu(self.c2_r(first)))
        attention = torch.sigmoid(third) - 0.5
        return (third + x) * attention, first, attention


class SPAN(nn.Module):
    """SPAN: six blocks between a first and a last convolution, joined, and pixels shuffled `scale` times finer. Images in 0 .. 1."""

    mean: Tensor

    def __init__(self, channels: int = 48, scale: int = 4) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.conv_1 = Conv3XC(3, channels)
        for i in range(1, BLOCKS + 1):
            self.add_module(f"block_{i}", SPAB(channels))
        self.conv_2 = Conv3XC(channels, channels)
        self.conv_cat = nn.Conv2d(4 * channels, channels, 1)
        self.upsampler = nn.Sequential(nn.Conv2d(channels, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, x: Float[Tensor, "batch 3 h w"]) -> Tensor:
        h = start = self.conv_1((x - self.mean) * RANGE)
        outputs, inner = [], start
        for i in range(1, BLOCKS + 1):
            h, inner, _ = getattr(self, f"block_{i}")(h)
            outputs.append(h)
        joined = torch.cat([start, self.conv_2(h), outputs[0], inner], 1)
        return self.upsampler(self.conv_cat(joined))


def fold(model: nn.Module) -> int:
    """Put a plain convolution in the place of every Conv3XC, in place; gives their number. ConvLoRA is attached after it.

    Raises RuntimeError if the model is adapted already, ValueError if nothing is left to fold.
    """
    if is_adapted(model):
        raise RuntimeError(
            "the model is adapted, and folding would put convolutions in the place of those that carry adapters; fold it first"
        )
    found = [name for name, m in model.named_modules() if isinstance(m, Conv3XC)]
    if not found:
        raise ValueError(f"the {type(model).__name__} has no Conv3XC, or is folded already; leave the call out")
    for name in found:
        model.set_submodule(name, model.get_submodule(name).folded())  # type: ignore[operator]
    return len(found)
