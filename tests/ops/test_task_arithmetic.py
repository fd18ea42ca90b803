"""TIES and DARE on numbers worked out by hand."""

import pytest
import torch
from torch import tensor

from loratory.ops.task_arithmetic import combined, drop_and_rescale, elect, trim, weighted_sum

T = tensor([[1.0, -4.0, 3.0, 0.5], [-2.0, -1.0, 5.0, 0.25]])


def test_trim_keeps_the_largest():
    assert trim(T[0], 0.5).tolist() == [0.0, -4.0, 3.0, 0.0]
    assert trim(T[0], 0.99).tolist() == [1.0, -4.0, 3.0, 0.0]
    assert torch.equal(trim(T, 1.0), T)
    assert trim(T, 0.1).tolist() == torch.zeros(2, 4).tolist()


def test_election():
    one = torch.ones(2)
    assert elect(T, one, "total").tolist() == [-2.0, -2.5, 4.0, 0.375]
    assert elect(T, one, "frequency").tolist() == [1.0, -2.5, 4.0, 0.375]  # one against one: plus
    assert elect(T, tensor([5.0, 1.0]), "total").tolist() == [-2.0, -10.5, 10.0, 1.375]  # weights do not vote
    assert combined(list(T), one, "ties", density=0.5).tolist() == [-2.0, -4.0, 4.0, 0.0]


def test_sums():
    assert weighted_sum(T, tensor([2.0, -1.0])).tolist() == [4.0, -7.0, 1.0, 0.75]
    assert combined(list(T), tensor([1.0, 1.0]), "magnitude_prune", density=0.5).tolist() == [-2.0, -4.0, 8.0, 0.0]


def test_dropping_keeps_the_expectation():
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(100, 100)
    out = drop_and_rescale(ones, 0.25, generator)
    assert set(out.unique().tolist()) == {0.0, 4.0}
    assert float(out.mean()) == pytest.approx(1.0, abs=0.06)
    assert torch.equal(drop_and_rescale(ones, 1.0, generator), ones)
