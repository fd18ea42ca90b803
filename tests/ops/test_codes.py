"""Numbers as integers of a few bits."""

import pytest
import torch

from loratory.ops.codes import coded, decoded, packed, unpacked


def test_codes_are_what_one_rounds_by_hand():
    c = torch.tensor([0.5, -1.0, 0.24, 0.0])
    q, most = coded(c, 4)
    assert (q.tolist(), most.tolist()) == ([4, -7, 2, 0], [1.0])  # of 3.5, -7, 1.68, 0
    torch.testing.assert_close(decoded(q, most, 4), torch.tensor([4, -7, 2, 0]) / 7)


@pytest.mark.parametrize("bits", range(2, 9))
def test_errors_are_half_a_step_and_packing_is_exact(bits):
    torch.manual_seed(0)
    c = torch.randn(3, 13) * torch.tensor([[1e-3], [1.0], [1e3]])
    q, most = coded(c, bits)
    top = 2 ** (bits - 1) - 1
    assert q.abs().amax(-1).tolist() == [top] * 3
    assert ((decoded(q, most, bits) - c).abs() <= 0.501 * most / top).all()
    data = packed(q, bits)
    assert data.numel() == -(-39 * bits // 8)
    assert torch.equal(unpacked(data, (3, 13), bits), q)


def test_order_of_the_bits():
    assert packed(torch.tensor([1, -2, 0], dtype=torch.int8), 3).tolist() == [0b010_101 | (0b100 & 0b11) << 6, 0b1]


def test_zeros_stay_zero():
    q, most = coded(torch.zeros(2, 5), 8)
    assert not most.any()
    assert torch.equal(decoded(q, most, 8), torch.zeros(2, 5))


@pytest.mark.parametrize("bits", [1, 9, -4])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}; it must be from 2 to 8"):
        coded(torch.ones(3), bits)
