"""What is made again in the backward pass equals what would have been kept, and is not kept."""

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from loratory.catalogue.properties import kept_storages
from loratory.ops.low_rank import Member, low_rank_linear, low_rank_linears
from loratory.ops.made_again import made_again, origin, product, reference

CHEAP = {
    "norm": (lambda x: F.rms_norm(x, (6,)), 1),
    "activation": (F.gelu, 1),
    "gated product": (lambda gate, up: F.silu(gate) * up, 2),
}


def inputs(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(2, 5, 6, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(count)]


def layer(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)
    made = {
        n: torch.randn(s, generator=g, dtype=torch.float64).to(dtype)
        for n, s in (("weight", (4, 6)), ("A", (2, 6)), ("B", (4, 2)))
    }
    return {n: t.requires_grad_(n != "weight") for n, t in made.items()} | {"bias": None}


def kept(run) -> int:
    """Bytes that autograd keeps."""
    return sum(t.untyped_storage().nbytes() for t in kept_storages(run))


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_outputs_and_gradients_through_a_low_rank_layer(name, autocast):
    f, count = CHEAP[name]
    results = []
    for make in (made_again, reference):
        dtype = torch.float32 if autocast else torch.float64
        xs, given = inputs(count, dtype), layer(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = low_rank_linear(make(f, *xs), **given)
        y.double().square().sum().backward()
        results.append([y, *(x.grad for x in xs), given["A"].grad, given["B"].grad])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_second_time_is_under_the_same_autocast():
    results, M = [], torch.randn(6, 6)
    for make in (made_again, reference):
        (x,) = inputs(1, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = make(lambda x: x @ M, x)
        y.square().sum().backward()
        results.append((y, x.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", CHEAP)
def test_the_inputs_alone_are_kept(name):
    f, count = CHEAP[name]
    xs, given = inputs(count), layer()
    size = kept(lambda: low_rank_linear(made_again(f, *xs), **given))
    h = 2 * 5 * 2 * 8
    assert size == sum(t.nbytes for t in (*xs, given["weight"], given["A"], given["B"])) + h
    plain = kept(lambda: low_rank_linear(f(*xs), **given))
    assert plain >= size + xs[0].nbytes  # the output of f at least


def test_siblings_make_it_again_once():
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(x.requires_grad)
        return torch.tanh(x)

    (x,), members = inputs(1), [Member(**layer()), Member(**layer())]
    a, b = low_rank_linears(made_again(f, x), members)
    (a.sum() + b.sum()).backward()
    assert calls == [True, False, True]  # forward, for A's gradient, for x's


@pytest.mark.parametrize("consumer", ["low rank", "plain"])
def test_nothing_outlives_the_backward_pass_but_what_is_asked_for(consumer):
    """The loss of a step is often alive until the next one."""
    (x,), given = inputs(1), layer()
    h = x * 1
    y = made_again(torch.tanh, h)
    z = low_rank_linear(y, **given) if consumer == "low rank" else y * 2
    ref = weakref.ref(h.untyped_storage())
    kept = [weakref.ref(t) for t in (h, y)]
    del h, y
    z.sum().backward()
    assert [k() for k in kept] == [None, None]
    assert ref() is None


def test_gradcheck():
    f, _ = CHEAP["gated product"]
    gate, up = inputs(2)
    assert torch.autograd.gradcheck(lambda *xs: made_again(f, *xs), (gate, up))
    assert torch.autograd.gradcheck(lambda x: made_again(f, x, up.detach()), (gate,))


def test_no_origin_without_a_backward_pass():
    (x,) = inputs(1)
    with torch.no_grad():
        assert origin(made_again(F.gelu, x)) is None
    assert origin(made_again(F.gelu, x)) is not None
    assert origin(made_again(F.gelu, x).detach()) is None
    assert origin(x) is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_checkpointing(reentrant):
    results = []
    for make in (made_again, reference):
        (x,), given = inputs(1), layer()

        def block(x, make=make, given=given):
            return low_rank_linear(make(F.gelu, x), **given)

        checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
        results.append((x.grad, given["A"].grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_change_of_the_input_in_between_is_an_error():
    x = inputs(1)[0].clone()
    y = made_again(torch.tanh, x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_change_that_only_the_layer_would_see_is_an_error():
    x, given = inputs(1)[0].detach().clone(), layer()
    y = low_rank_linear(made_again(torch.tanh, x), **given)  # x needs no gradient: the layer alone keeps it
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivative_is_refused_with_the_way_out():
    (x,) = inputs(1)
    with pytest.raises(RuntimeError, match=r"no second derivative.*close\(\)"):
        torch.autograd.grad(made_again(torch.tanh, x).sum(), x, create_graph=True)


@pytest.mark.usefixtures("compiling")
def test_the_compiler_sees_the_definition():
    (x,) = inputs(1)
    f = torch.compile(lambda x: made_again(torch.tanh, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(f(x), torch.tanh(x))


def test_modules_as_f():
    norm, (x,) = nn.LayerNorm(6).double().requires_grad_(False), inputs(1)
    made_again(norm, x).square().sum().backward()
    theirs = x.grad.clone()
    x.grad = None
    norm(x).square().sum().backward()
    torch.testing.assert_close(theirs, x.grad)


# -- products with a matrix that is made again ---------------------------------------------------------------------------


def scaled(c: Tensor) -> Tensor:
    """A matrix (7, 6) made from few numbers."""
    return c.unsqueeze(-1) * torch.arange(1.0, 7.0).to(c)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_product_is_that_of_the_kept_matrix(frozen: bool, autocast: bool):
    dtype = torch.float32 if autocast else torch.float64
    results = []
    for again in (False, True):
        (x,) = inputs(1, dtype)
        c = torch.linspace(-1, 1, 7, dtype=dtype).requires_grad_(not frozen)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = product(x, scaled(c), lambda c=c: scaled(c).detach(), [c]) if again else F.linear(x, scaled(c))
        y.sin().sum().backward()
        results.append((y, x.grad, c.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2 if autocast else None, atol=1e-2 if autocast else None)


def test_a_product_keeps_its_input_alone_and_sees_a_change():
    c = torch.linspace(-1, 1, 7, dtype=torch.float64).requires_grad_()

    def run(again: bool) -> Tensor:
        (x,) = inputs(1)
        return product(x, scaled(c), lambda: scaled(c).detach(), [c]) if again else F.linear(x, scaled(c))

    assert kept(lambda: run(False)) - kept(lambda: run(True)) == 7 * 6 * 8 - 7 * 8  # c is told of twice
    y = run(True)
    with torch.no_grad():
        c.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match=r"no second derivative.*keeps its factors"):
        torch.autograd.grad(run(True).sin().sum(), [c], create_graph=True)
