"""The product that unpacks its weight twice: equal to the definition, gradients included, and nothing kept."""

import pytest
import torch
from torch import Tensor

from loratory.ops import recomputed
from loratory.ops.recomputed import recomputed_linear, reference


class Weight:
    """A weight that counts the numbers read of it."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        self.W, self.count = torch.randn(*shape, dtype=dtype), 0

    def __call__(self, rows: slice) -> Tensor:
        self.count += self.W[rows].numel()
        return self.W[rows].clone()


@pytest.mark.parametrize("most", [1, 40, 1 << 22])
@pytest.mark.parametrize("has_bias", [True, False])
def test_equal_to_the_definition(monkeypatch: pytest.MonkeyPatch, most: int, has_bias: bool):
    monkeypatch.setattr(recomputed, "MOST", most)
    read, x = Weight(13, 7), torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(13, dtype=torch.float64, requires_grad=True) if has_bias else None
    own = [x] if bias is None else [x, bias]
    y, expected = recomputed_linear(x, read, bias, 13), reference(x, read, bias, 13)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, own, g), torch.autograd.grad(expected, own, g), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_both_orders():
    read = Weight(5, 4)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    square = lambda x: recomputed_linear(x, read, None, 5) ** 2  # noqa: E731
    assert torch.autograd.gradcheck(square, x)
    assert torch.autograd.gradgradcheck(square, x)


def test_the_weight_is_read_once_each_way_and_never_kept():
    read, x = Weight(13, 7), torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = recomputed_linear(x, read, None, 13)
    assert read.count == 13 * 7
    assert saved == []
    y.sum().backward()
    assert read.count == 2 * 13 * 7


def test_no_reading_in_backward_where_the_input_needs_no_gradient():
    read, bias = Weight(13, 7), torch.zeros(13, dtype=torch.float64, requires_grad=True)
    recomputed_linear(torch.randn(4, 7, dtype=torch.float64), read, bias, 13).sum().backward()
    assert read.count == 13 * 7


def test_autocast_decides_the_dtype():
    read = Weight(6, 5, dtype=torch.float32)
    x = torch.randn(2, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = recomputed_linear(x, read, torch.zeros(6), 6)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, read.W.sum(0).expand(2, 5), atol=0.1, rtol=0.05)
