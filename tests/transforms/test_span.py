"""SPAN: counts of the sheet, and folding that changes nothing."""

import pytest
import torch

import loratory as lt
from loratory.transforms.span import SPAN, fold


@pytest.mark.parametrize(
    ("channels", "scale", "numbers"), [(26, 4, 130_828), (28, 4, 150_688), (48, 4, 426_288), (48, 2, 410_700)]
)
def test_counts_after_folding(channels, scale, numbers):
    net = SPAN(channels, scale)
    fold(net)
    assert sum(p.numel() for p in net.parameters()) == numbers


def test_folding_keeps_the_function_and_is_done_once():
    net = SPAN(4, 2).double()
    x = torch.rand(1, 3, 5, 6).double()
    before = net(x)
    assert fold(net) == 20
    torch.testing.assert_close(net(x), before)
    with pytest.raises(ValueError, match="has no Conv3XC, or is folded already"):
        fold(net)


def test_an_adapted_network_is_not_folded():
    net = SPAN(4, 2)
    lt.adapt(net, lt.LoRA(rank=2), "upsampler.0")
    with pytest.raises(RuntimeError, match=r"the model is adapted.*fold it first"):
        fold(net)
