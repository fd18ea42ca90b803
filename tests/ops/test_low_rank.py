"""The fused low-rank layer against its definition: outputs and every gradient."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import loratory as lt
from loratory.ops.low_rank import Member, low_rank_linear, low_rank_linears, reference, unfused

NAMES = ("x", "weight", "bias", "A", "B", "u")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def tensors(
    *batch: int,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    u: bool = False,
    adapter: torch.dtype | None = None,
) -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (*batch, 6), "weight": (5, 6), "bias": (5,), "A": (2, 6), "B": (5, 2), "u": (*batch, 6)}
    made = {n: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for n, shape in shapes.items()}
    if adapter is not None:
        made |= {n: made[n].to(adapter) for n in "AB"}
    return made | ({} if bias else {"bias": None}) | ({} if u else {"u": None})


def leaves(given: dict[str, Tensor | None], needing: tuple[str, ...] = NAMES) -> dict[str, Tensor | None]:
    return {n: None if t is None else t.detach().clone().requires_grad_(n in needing) for n, t in given.items()}


def gradients(function, given: dict[str, Tensor | None], weights: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    out = function(**given)
    (out * weights.to(out.dtype)).sum().backward()
    return out.detach(), {n: None if t is None else t.grad for n, t in given.items()}


def assert_same(ours: Tensor | None, theirs: Tensor | None, tolerance: float, what: str) -> None:
    assert (ours is None) == (theirs is None), what
    if ours is not None and theirs is not None:
        assert ours.shape == theirs.shape, what
        assert ours.dtype == theirs.dtype, what
        if ours.numel():
            error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-12)
            assert error <= tolerance, f"{what}: {error}"


@pytest.mark.parametrize("batch", [(), (4,), (3, 4), (2, 3, 4), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("u", [True, False], ids=["dropped", "same input"])
def test_outputs_and_gradients_for_every_batch_shape(batch, bias, u):
    given = tensors(*batch, bias=bias, u=u)
    weights = torch.randn(*batch, 5, dtype=torch.float64)
    ours, ours_grads = gradients(low_rank_linear, leaves(given), weights)
    theirs, theirs_grads = gradients(reference, leaves(given), weights)
    assert_same(ours, theirs, 1e-12, "output")
    for n in NAMES:
        assert_same(ours_grads[n], theirs_grads[n], 1e-12, n)


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_the_scale_is_on_the_update_alone(scale):
    given, weights = tensors(4), torch.randn(4, 5, dtype=torch.float64)
    ours, ours_grads = gradients(lambda **t: low_rank_linear(**t, scale=scale), leaves(given), weights)
    folded = leaves(given)
    theirs, _ = gradients(lambda **t: reference(**(t | {"B": scale * t["B"]})), folded, weights)
    assert_same(ours, theirs, 1e-12, "output")
    for n in NAMES:
        assert_same(ours_grads[n], None if folded[n] is None else folded[n].grad, 1e-12, n)


@pytest.mark.parametrize("u", [True, False], ids=["dropped", "same input"])
def test_only_the_gradients_asked_for(u):
    given, weights = tensors(4, u=u), torch.randn(4, 5, dtype=torch.float64)
    some = [n for n in NAMES if given[n] is not None]
    for needing in itertools.chain.from_iterable(itertools.combinations(some, k) for k in range(1, len(some) + 1)):
        _, ours = gradients(low_rank_linear, leaves(given, needing), weights)
        _, theirs = gradients(reference, leaves(given, needing), weights)
        for n in NAMES:
            assert_same(ours[n], theirs[n], 1e-12, f"{n} of {needing}")


@pytest.mark.parametrize("u", [True, False], ids=["dropped", "same input"])
def test_gradcheck(u):
    given = leaves(tensors(3, u=u))
    assert torch.autograd.gradcheck(low_rank_linear, tuple(given[n] for n in NAMES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter", ["same", "float32"])
@pytest.mark.parametrize("u", [True, False], ids=["dropped", "same input"])
def test_narrow_dtypes_against_the_definition_in_float64(dtype, adapter, u):
    given = tensors(3, 7, dtype=dtype, u=u, adapter=torch.float32 if adapter == "float32" else None)
    weights = torch.randn(3, 7, 5)
    ours, ours_grads = gradients(low_rank_linear, leaves(given), weights)
    wide = {n: None if t is None else t.double() for n, t in given.items()}
    theirs, theirs_grads = gradients(reference, leaves(wide), weights.to(dtype))
    assert ours.dtype == dtype
    assert_same(ours.double(), theirs, TOLERANCE[dtype], "output")
    for n in NAMES:
        if given[n] is not None:
            assert ours_grads[n].dtype == given[n].dtype, n
            assert_same(ours_grads[n].double(), theirs_grads[n], TOLERANCE[dtype], n)


@pytest.mark.parametrize("u", [True, False], ids=["dropped", "same input"])
def test_autocast_is_that_of_the_definition(u):
    given, weights = tensors(3, 7, dtype=torch.float32, u=u), torch.randn(3, 7, 5)
    results = []
    for function in (low_rank_linear, reference):
        own = leaves(given)
        with torch.autocast("cpu", torch.bfloat16):
            out = function(**own)
        (out * weights.to(out.dtype)).sum().backward()
        results.append((out, {n: None if t is None else t.grad for n, t in own.items()}))
    (ours, ours_grads), (theirs, theirs_grads) = results
    assert ours.dtype == torch.bfloat16
    assert_same(ours, theirs, 2e-2, "output")
    for n in NAMES:
        assert_same(ours_grads[n], theirs_grads[n], 2e-2, n)


def test_no_grad_and_inference_mode():
    given = tensors(4)
    expected = reference(**given)
    with torch.no_grad():
        out = low_rank_linear(**leaves(given))
    assert not out.requires_grad
    torch.testing.assert_close(out, expected)
    with torch.inference_mode():
        torch.testing.assert_close(low_rank_linear(**given), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["no dropout", "dropout"])
def test_checkpointing_gives_the_gradients_of_a_plain_run(reentrant, p):
    def layer(x, weight, bias, A, B):
        return torch.tanh(low_rank_linear(x, weight, bias, A, B, F.dropout(x, p) if p else None))

    given = {n: t for n, t in tensors(4).items() if n != "u"}
    results = []
    for run in (layer, lambda *a: checkpoint(layer, *a, use_reentrant=reentrant)):
        own = leaves(given)
        torch.manual_seed(7)
        run(*own.values()).square().sum().backward()
        results.append(own)
    for n in given:
        assert torch.equal(results[0][n].grad, results[1][n].grad), n


def test_second_derivative_is_refused_with_the_way_out():
    given = leaves(tensors(4))
    loss = low_rank_linear(**given).square().sum()
    with pytest.raises(
        RuntimeError, match=r"no second derivative.*create_graph=True.*loratory\.ops\.low_rank\.unfused"
    ):
        torch.autograd.grad(loss, given["A"], create_graph=True)


def test_unfused_has_derivatives_of_every_order():
    given = leaves(tensors(3))
    with unfused():
        assert torch.autograd.gradgradcheck(low_rank_linear, tuple(given[n] for n in NAMES))
    assert "LowRankLinear" in low_rank_linear(**given).grad_fn.name()


def test_unfused_returns_after_an_error():
    given = leaves(tensors(3))
    with pytest.raises(ZeroDivisionError), unfused():
        _ = 1 / 0
    assert "LowRankLinear" in low_rank_linear(**given).grad_fn.name()


def test_inputs_need_not_be_contiguous():
    given = tensors(4, 3)
    turned = dict(given)
    for n in ("weight", "A", "B"):
        turned[n] = given[n].t().contiguous().t()
    turned["x"] = given["x"].transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned["x"].is_contiguous()
    weights = torch.randn(3, 4, 5, dtype=torch.float64).transpose(0, 1)
    ours, ours_grads = gradients(low_rank_linear, leaves(turned), weights)
    theirs, theirs_grads = gradients(reference, leaves(given), weights)
    assert_same(ours, theirs, 1e-12, "output")
    for n in NAMES:
        assert_same(ours_grads[n], theirs_grads[n], 1e-12, n)


def test_an_expanded_gradient():
    """sum().backward() sends a gradient with stride 0."""
    given = tensors(4, 3)
    a, b = leaves(given), leaves(given)
    low_rank_linear(**a).sum().backward()
    reference(**b).sum().backward()
    for n in NAMES:
        assert_same(None if a[n] is None else a[n].grad, None if b[n] is None else b[n].grad, 1e-12, n)


@pytest.mark.usefixtures("compiling")
def test_one_compiled_graph():
    given, weights = tensors(4, 3, dtype=torch.float32), torch.randn(4, 3, 5)
    compiled = torch.compile(low_rank_linear, fullgraph=True, backend="aot_eager")
    ours, ours_grads = gradients(compiled, leaves(given), weights)
    theirs, theirs_grads = gradients(reference, leaves(given), weights)
    assert_same(ours, theirs, 1e-5, "output")
    for n in NAMES:
        assert_same(ours_grads[n], theirs_grads[n], 1e-5, n)


def test_an_adapted_linear_runs_fused():
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(4, 6)
    lt.adapt(model, lt.LoRA(rank=2), where="0")
    assert "LowRankLinear" in model(x).grad_fn.name()
    with unfused():
        assert "LowRankLinear" not in model(x).grad_fn.name()


# -- several layers that share x ---------------------------------------------------------------------------------------


def siblings(dtype: torch.dtype = torch.float64, needing: str = "AB") -> tuple[Tensor, list[Member]]:
    """Layers of different widths, ranks and scales, the second without a bias."""
    g = torch.Generator().manual_seed(5)

    def make(*shape: int, name: str) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(name in needing)

    members = [
        Member(
            make(out, 6, name="W"),
            make(out, name="b") if bias else None,
            make(rank, 6, name="A"),
            make(out, rank, name="B"),
            scale,
        )
        for out, rank, bias, scale in ((5, 2, True, 0.5), (8, 1, False, 1.0), (7, 4, True, 3.0))
    ]
    return make(2, 4, 6, name="x"), members


def each_alone(x: Tensor, members: list[Member], u: Tensor | None = None) -> tuple[Tensor, ...]:
    return tuple(reference(x, m.weight, m.bias, m.A, m.B, u, m.scale) for m in members)


def run_siblings(function, used: tuple[int, ...] = (0, 1, 2), autocast: bool = False, **made):
    """Outputs, and the gradient of each tensor in order."""
    x, members = siblings(**made)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = function(x, members)
    g = torch.Generator().manual_seed(6)
    weights = [torch.randn(y.shape, generator=g, dtype=torch.float64) for y in outputs]
    sum((outputs[i].double() * weights[i]).sum() for i in used).backward()
    leaves = [x, *(t for m in members for t in m if isinstance(t, Tensor))]
    return [y.detach() for y in outputs], [t.grad for t in leaves]


@pytest.mark.parametrize("needing", ["xAB", "AB", "A", "B", "x", "xWbAB", "W", "b", "WA"])
def test_siblings_equal_each_alone(needing):
    ours, theirs = (run_siblings(f, needing=needing) for f in (low_rank_linears, each_alone))
    for i, (a, b) in enumerate(zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True)):
        assert_same(a, b, 1e-12, f"tensor {i}")


@pytest.mark.parametrize("used", [(0,), (1, 2), (0, 2)], ids=str)
def test_an_output_that_is_not_used_gives_no_gradient(used):
    ours, theirs = (run_siblings(f, used, needing="xAB") for f in (low_rank_linears, each_alone))
    for i, (a, b) in enumerate(zip(ours[1], theirs[1], strict=True)):
        assert_same(a, b, 1e-12, f"tensor {i}")
    assert sum(g is None for g in ours[1]) > sum(g is None for g in run_siblings(low_rank_linears, needing="xAB")[1])


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("needing", ["xWbAB", "xAB", "AB"])
def test_siblings_under_autocast(needing, again):
    def joined(x, members):
        return low_rank_linears(x, [m._replace(cast_again=again) for m in members])

    ours, theirs = (run_siblings(f, autocast=True, needing=needing, dtype=torch.float32) for f in (joined, each_alone))
    for i, (a, b) in enumerate(zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True)):
        assert_same(a, b, 3e-2, f"tensor {i}")


@pytest.mark.parametrize("again", [True, False])
def test_autocast_keeps_no_narrow_copy_of_a_weight_that_is_cast_again(again):
    x, members = siblings(torch.float32, needing="xAB")
    members = [m._replace(cast_again=again) for m in members]
    shapes = []

    def pack(t: Tensor) -> Tensor:
        shapes.append((tuple(t.shape), t.dtype))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        low_rank_linears(x, members)
    kept, other = (torch.float32, torch.bfloat16) if again else (torch.bfloat16, torch.float32)
    assert {(tuple(m.weight.shape), kept) for m in members} <= set(shapes)
    assert not {(tuple(m.weight.shape), other) for m in members} & set(shapes)
    assert shapes.count(((2, 4, 6), torch.bfloat16)) == 1  # x, once for all


def test_siblings_with_dropout_share_u():
    x, members = siblings()
    u = F.dropout(x, 0.5)
    for a, b in zip(low_rank_linears(x, members, u), each_alone(x, members, u), strict=True):
        assert_same(a, b, 1e-12, "output")


def test_siblings_unfused_have_derivatives_of_every_order():
    x, members = siblings(needing="xAB")
    with unfused():
        a, _, b = low_rank_linears(x, members)
        (first,) = torch.autograd.grad((a.sin().sum() + b.sin().sum()), x, create_graph=True)
    assert torch.autograd.grad(first.sum(), members[0].A)[0] is not None


def test_shapes_are_checked_in_tests():
    given = tensors(4)
    given["A"] = given["A"].t()
    with pytest.raises(Exception, match="Type-check error"):
        low_rank_linear(**given)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_what_follows_may_write_into_the_output(shape, count, bias):
    g = torch.Generator().manual_seed(0)
    members = [
        Member(*(torch.randn(s, generator=g, requires_grad=r) for s, r in (((6, 5), False), ((6,), False), ((2, 5), True), ((6, 2), True))))
        for _ in range(count)
    ]  # fmt: skip
    members = members if bias else [m._replace(bias=None) for m in members]
    x = torch.randn(shape, generator=g, requires_grad=True)
    tensors = [x, *(t for m in members for t in (m.A, m.B))]

    def gradients(inplace: bool) -> tuple[torch.Tensor, ...]:
        outputs = low_rank_linears(x, members)
        loss = sum(nn.functional.relu(y, inplace=inplace).square().sum() for y in outputs)
        return torch.autograd.grad(loss, tensors)

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected)
