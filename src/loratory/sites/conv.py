"""Convolutions: W (groups, out / groups, in / groups * kernel), without the leading dimension where there is one group.

`down` is a convolution with the layer's own kernel size, stride, dilation, padding and padding mode into rank channels a group;
`up` is a 1 x 1 convolution. So B A, viewed as a kernel, is the update of the kernel.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from loratory.sites.site import Site

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvSite(Site):
    """torch.nn.Conv1d, Conv2d, Conv3d."""

    kind = "conv"

    @property
    def shape(self) -> tuple[int, ...]:
        out, columns = self.weight.shape[0], self.weight[0].numel()
        groups = self.module.groups
        return (out, columns) if groups == 1 else (groups, out // groups, columns)

    def write(self, W: Float[Tensor, "*stack out in"]) -> None:
        with torch.no_grad():
            self.weight.copy_(W.reshape(self.weight.shape))

    def apply(self, x: Tensor, W: Float[Tensor, "*stack out in"]) -> Tensor:
        return self.module._conv_forward(x, W.reshape(self.weight.shape).to(x.dtype), None)

    def down(self, x: Tensor, A: Float[Tensor, "*stack rank in"]) -> Tensor:
        return self.module._conv_forward(x, A.reshape(-1, *self.weight.shape[1:]), None)

    def up(self, h: Tensor, B: Float[Tensor, "*stack out rank"]) -> Tensor:
        groups, dims = self.module.groups, self.weight.dim() - 2
        return _CONVOLVE[dims](h, B.reshape(-1, B.shape[-1], *(1,) * dims), groups=groups)

    def low_rank_rows(
        self,
        x: Tensor,
        A: Float[Tensor, "adapters *stack rank in"],
        B: Float[Tensor, "adapters *stack out rank"],
        which: Int[Tensor, " rows"],
    ) -> Tensor:
        m, rows, dims = self.module, len(which), self.weight.dim() - 2
        convolve, padding = _CONVOLVE[dims], m.padding
        if m.padding_mode != "zeros":
            x, padding = F.pad(x, m._reversed_padding_repeated_twice, m.padding_mode), 0
        flat = x.reshape(1, -1, *x.shape[2:])  # the rows side by side, each as groups of its own
        kernels = A[which].reshape(-1, *self.weight.shape[1:])
        h = convolve(flat, kernels, None, m.stride, padding, m.dilation, rows * m.groups)
        points = B[which].reshape(-1, B.shape[-1], *(1,) * dims)
        y = convolve(h, points, groups=rows * m.groups)
        return y.reshape(rows, -1, *y.shape[2:])

    def along_out(self, v: Float[Tensor, "*stack out"]) -> Tensor:
        return v.reshape(-1, *(1,) * (self.weight.dim() - 2))
