"""How far two updates of one weight are from disturbing each other (SHiRA, arXiv 2406.13175, section 4).

Dense and low-rank updates meet everywhere; sparse ones only where an output is changed by both.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Norm = Literal["frobenius", "spectral"]


def awom(
    first: Float[Tensor, "*stack out in"], second: Float[Tensor, "*stack out in"], norm: Norm = "frobenius"
) -> Float[Tensor, "*stack"]:
    """Adapter weight orthogonality magnitude: |A1^T A2|. The paper does not say which norm its l2 is."""
    return torch.linalg.matrix_norm(first.mT @ second, "fro" if norm == "frobenius" else 2)


def awor(
    first: Float[Tensor, "*stack out in"], second: Float[Tensor, "*stack out in"], tolerance: float = 0.0
) -> Float[Tensor, "*stack"]:
    """Adapter weight orthogonality ratio: 1 - nnz(A1^T A2) / in^2; an entry up to `tolerance` counts as 0.

    For places drawn independently with probability p its expectation is (1 - p^2)^out; of two dense updates it is 0.
    """
    return 1 - ((first.mT @ second).abs() > tolerance).float().mean((-2, -1))
