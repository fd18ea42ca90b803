"""Random matrices that are made from a key: what they are like, and sums of them against the definition."""

import math
from collections.abc import Callable

import pytest
import torch

from loratory.ops import random_basis
from loratory.ops.random_basis import combined, kept, reference, uniform

KEY = torch.tensor([-123456789, 987654321], dtype=torch.int32)


def hashed(key: tuple[int, int], number: int, place: int) -> float:
    """One number of the basis, in whole numbers of Python."""

    def mixed(x: int, before: int, between: int) -> int:
        x = (x + before) % 2**32
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x + between) % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    golden = 0x9E3779B1
    own = mixed(number * golden, *key), mixed(number * golden, *reversed(key))
    return (mixed(place * golden, *own) >> 8) / 2**23 - 1


def test_each_number_is_the_hash_of_its_place():
    found = uniform(KEY, 0, 3, 5)
    assert found.dtype == torch.float32
    assert found.tolist() == [[hashed((KEY[0].item(), KEY[1].item()), i, p) for p in range(5)] for i in range(3)]


def test_numbers_are_uniform_and_unrelated():
    """Means within 5 deviations of what independent numbers give; singular values within those of such a matrix."""
    M = uniform(KEY, 0, 64, 4096).double()
    count = M.numel()
    assert M.min() >= -1
    assert M.max() < 1
    assert abs(M.mean()) < 5 / math.sqrt(3 * count)
    assert M.square().mean().item() == pytest.approx(1 / 3, abs=5 * math.sqrt(4 / 45 / count))
    shares = torch.histc(M, 64, -1, 1)
    assert ((shares - count / 64).square() / (count / 64)).sum() < 63 + 5 * math.sqrt(2 * 63)  # chi-squared
    flat = M.flatten()
    for lag in (1, 2, 64, 4096):
        assert abs((flat[:-lag] * flat[lag:]).mean()) < 5 / 3 / math.sqrt(count)
    values = torch.linalg.svdvals(M) * math.sqrt(3 / 4096)
    assert values[0] < 1.05 * (1 + math.sqrt(64 / 4096))
    assert values[-1] > 0.95 * (1 - math.sqrt(64 / 4096))
    for other in ([KEY[0] + 1, KEY[1]], [KEY[0], KEY[1] + 1], [KEY[1], KEY[0]], [0, 0]):
        N = uniform(torch.tensor(other, dtype=torch.int32), 0, 64, 4096).double()
        assert (3 * M @ N.T / 4096).abs().max() < 6 / math.sqrt(4096)


def test_matrices_are_the_same_however_many_are_made():
    whole = uniform(KEY, 0, 6, 10)
    assert torch.equal(torch.cat([uniform(KEY, i, 2, 10) for i in (0, 2, 4)]), whole)
    assert torch.equal(uniform(KEY, 0, 6, 4), whole[:, :4])


@pytest.mark.parametrize("chunks", [None, 1, 3, 6])
@pytest.mark.parametrize("stack", [(), (2, 3)])
def test_the_sum_is_its_definition(stack, chunks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(random_basis, "AT_ONCE_CPU", 40)  # 4 of 6 at a time
    torch.manual_seed(0)
    c = torch.randn(*stack, 6).double().requires_grad_()
    torch.testing.assert_close(combined(c, KEY, 10, chunks), reference(c, KEY, 10))
    torch.testing.assert_close(kept(c, uniform(KEY, 0, 6, 10).view(6, 2, 5)), reference(c, KEY, 10).view(*stack, 2, 5))
    assert torch.autograd.gradcheck(lambda c: combined(c, KEY, 10, chunks), c)
    assert torch.autograd.gradgradcheck(lambda c: combined(c, KEY, 10, chunks), c)


@pytest.mark.parametrize(("most", "chunks", "expected"), [(40, None, 4), (5, None, 1), (10**6, None, 6), (40, 3, 2)])
def test_few_matrices_exist_at_a_time(most, chunks, expected, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(random_basis, "AT_ONCE_CPU", most)
    seen: list[int] = []
    right: Callable[..., torch.Tensor] = random_basis.uniform
    monkeypatch.setattr(
        random_basis, "uniform", lambda key, i, count, size: (seen.append(count), right(key, i, count, size))[1]
    )
    combined(torch.ones(6, requires_grad=True), KEY, 10, chunks).sum().backward()
    assert max(seen) == expected
    assert sum(seen) == 12  # forward and backward


def test_autocast_leaves_the_sum_in_full_precision():
    c = torch.linspace(-1, 1, 6)
    M = uniform(KEY, 0, 6, 10).view(6, 2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(combined(c, KEY, 10), combined(c, KEY, 10))
        found = combined(c, KEY, 10), kept(c, M)
    assert {t.dtype for t in found} == {torch.float32}
    torch.testing.assert_close(found[0], reference(c, KEY, 10))
    torch.testing.assert_close(found[1].flatten(), reference(c, KEY, 10))


def test_meta_tensors_have_shapes_alone():
    c = torch.empty(2, 6, device="meta", requires_grad=True)
    combined(c, KEY.to("meta"), 10).sum().backward()
    assert c.grad is not None
    assert c.grad.shape == (2, 6)
    assert uniform(KEY.to("meta"), 0, 3, 4).shape == (3, 4)
