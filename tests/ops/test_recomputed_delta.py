"""A layer whose update is made again in the backward pass, against its definition."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from loratory.ops.recomputed_delta import recomputed_delta, reference
from loratory.sites import find_site

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(7, 5), None),
}


def delta(tensors):
    return torch.tanh(tensors[0]) @ tensors[1]


def parts(kind: str, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    make, size = LAYERS[kind]
    site = find_site("layer", make().to(dtype))
    *stack, out, inputs = site.shape
    tensors = [torch.randn(*stack, *shape).to(dtype).requires_grad_() for shape in ((out, 2), (2, inputs))]
    x = torch.arange(6).reshape(2, 3) if size is None else torch.randn(size).to(dtype).requires_grad_()
    return site, x, tensors


def gradients(function, kind: str, dtype: torch.dtype = torch.float64):
    site, x, tensors = parts(kind, dtype)
    y = function(x, site, delta, tensors)
    wanted = [t for t in (x, *tensors) if t.requires_grad]
    return y, torch.autograd.grad((y.double() ** 3).sum(), wanted)


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_those_of_the_definition(kind):
    (y, found), (z, expected) = gradients(recomputed_delta, kind), gradients(reference, kind)
    torch.testing.assert_close(y, z)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_gradcheck(kind):
    site, x, tensors = parts(kind)
    assert torch.autograd.gradcheck(lambda x, *t: recomputed_delta(x, site, delta, t), (x, *tensors))


def test_under_activation_checkpointing_and_autocast():
    expected = gradients(recomputed_delta, "linear")[1]
    found = gradients(lambda *a: checkpoint(recomputed_delta, *a, use_reentrant=False), "linear")[1]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        y, found = gradients(recomputed_delta, "linear", torch.float32)
    assert y.dtype == torch.bfloat16
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) < 0.03


def test_no_matrix_is_kept_and_one_is_made_at_a_time():
    site, x, tensors = parts("linear")
    kept, made = [], []

    def counted(tensors):
        made.append(1)
        return delta(tensors)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = recomputed_delta(x, site, counted, tensors)
    assert all(t.shape not in (site.shape, site.shape[::-1]) for t in kept)
    assert len(made) == 1
    y.sum().backward()
    assert len(made) == 3  # for dx, and for what D's gradient gives for the tensors
    assert site.weight.grad is None


def test_second_derivatives_are_refused():
    site, x, tensors = parts("linear")
    y = recomputed_delta(x, site, delta, tensors)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("kind", LAYERS)
def test_alone_it_is_the_product_with_the_update(kind):
    def both(function):
        return gradients(lambda *a: function(*a, alone=True), kind)

    (y, found), (z, expected) = both(recomputed_delta), both(reference)
    torch.testing.assert_close(y, z)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_pull_stands_in_for_the_second_making():
    made = []

    class Product:
        def __call__(self, tensors):
            made.append(1)
            return tensors[0] @ tensors[1]

        def pull(self, tensors, dD):
            return [dD @ tensors[1].mT, tensors[0].mT @ dD]

    site, x, tensors = parts("linear")
    found = torch.autograd.grad((recomputed_delta(x, site, Product(), tensors) ** 3).sum(), (x, *tensors))
    assert len(made) == 2
    expected = torch.autograd.grad((reference(x, site, Product(), tensors) ** 3).sum(), (x, *tensors))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
