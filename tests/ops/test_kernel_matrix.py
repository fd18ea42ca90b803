"""Kernel matrices and their sparse updates, in blocks, against definitions."""

import pytest
import torch

from loratory.ops import kernel_matrix as ops
from loratory.ops.kernel_matrix import (
    KernelDelta,
    Rule,
    at_start,
    kernel_matrix,
    reference,
    reference_size_quantile,
    size_quantile,
)

RULES = [Rule(kernel, norm, threshold)
    for kernel, norm in (("mix", 2), ("mix", 1), ("distance", 2), ("distance", 1), ("linear", 2))
    for threshold in ("hard", "soft", "none")]  # fmt: skip
BLOCKS = pytest.mark.parametrize("least", [40, 1 << 16])


def parts(rule: Rule, *stack: int, ins: int = 11, outs: int = 7, width: int = 3):
    torch.manual_seed(0)
    heads = 1 if rule.kernel == "linear" else 2
    tensors = [torch.randn(*stack, heads, side, width).double() for side in (ins, outs)]
    if rule.kernel == "mix":
        tensors += [torch.tensor(value).double().expand(*stack, 1) + 0.1 * torch.rand(*stack, 1) for value in (1.5, 0.7, -0.02)]  # fmt: skip
    return [t.clone().requires_grad_() for t in tensors], torch.tensor([0.1, -0.1][:heads]).double()


def test_entries_are_those_of_the_formula():
    (P, Q, alpha, gamma, beta), c = parts(Rule("mix", 2, "hard"))
    mixing = (alpha, gamma, beta)
    for norm in (1, 2):
        k = torch.stack([torch.stack([
            sum(float(c[h]) * (P[h, i] - Q[h, o]).norm(p=norm) for h in range(2)) for o in range(7)]) for i in range(11)])  # fmt: skip
        torch.testing.assert_close(kernel_matrix(P, Q, c, (), Rule("distance", norm, "hard")), k)
        e = (k / gamma).exp()
        expected = k + alpha * e / e.sum(1, keepdim=True) + beta
        torch.testing.assert_close(kernel_matrix(P, Q, c, mixing, Rule("mix", norm, "hard")), expected)
    one = Rule("linear", 2, "hard")
    torch.testing.assert_close(kernel_matrix(P[:1], Q[:1], c[:1], (), one), P[0] @ Q[0].T)


@BLOCKS
@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_in_blocks_the_update_and_its_gradients_are_those_of_the_definition(rule, begun, stack, least, monkeypatch):
    monkeypatch.setattr(ops, "LEAST", least)
    tensors, c = parts(rule, *stack)
    s = torch.tensor(0.6).double().expand(*stack, 1)
    start = None
    if begun:
        P0, Q0 = (t.detach() * 0.5 for t in tensors[:2])
        K0 = kernel_matrix(P0, Q0, c, at_start([t.detach() for t in tensors[2:]]), rule)
        start = P0, Q0, None if rule.threshold == "none" else reference_size_quantile(K0, s)
    expected = reference(tensors, c, s, rule, start)
    found = KernelDelta(c, s, rule, start)(tensors)
    torch.testing.assert_close(found, expected)
    G = torch.randn_like(expected)
    for one, other in zip(torch.autograd.grad(found, tensors, G), torch.autograd.grad(expected, tensors, G), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("threshold", "gain"), [("hard", lambda K, tau: K.abs()), ("soft", lambda K, tau: K.abs() - tau)])  # fmt: skip
def test_kept_entries_carry_their_size_as_a_constant(threshold, gain):
    rule = Rule("distance", 2, threshold)
    tensors, c = parts(rule)
    s = torch.tensor([0.6]).double()
    K = kernel_matrix(*tensors, c, (), rule)
    tau = torch.quantile(K.detach().abs().flatten(), 0.6)
    g = torch.where(K.abs() > tau, gain(K, tau), 0).detach()
    assert int((g != 0).sum()) == 31  # of 77: 0.6 of 76 places lie at or below
    D = KernelDelta(c, s, rule)(tensors)
    torch.testing.assert_close(D, (K * g).mT)
    G = torch.randn_like(D)
    for one, other in zip(torch.autograd.grad(D, tensors, G), torch.autograd.grad(K * g, tensors, G.mT), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("least", [1, 1 << 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("s", [0.0, 0.01, 0.25, 0.5, 0.73, 0.999, 1.0])
def test_quantiles_are_those_of_torch(s, dtype, least, monkeypatch):
    monkeypatch.setattr(ops, "LEAST", least)
    torch.manual_seed(0)
    K = torch.randn(3, 13, 9).to(dtype)
    K[1] = K[1].round()  # equal numbers
    K[2, 0] = 0
    share = torch.full((3, 1), s, dtype=dtype)
    for function in (size_quantile, reference_size_quantile):
        found = function(K, share)
        torch.testing.assert_close(
            found.squeeze(-1), torch.quantile(K.abs().flatten(1), s, dim=1), rtol=1e-5, atol=1e-6
        )
    assert torch.equal(size_quantile(K, share), reference_size_quantile(K, share))


def test_a_share_of_one_keeps_nothing_and_of_none_drops_the_smallest():
    rule = Rule("distance", 2, "hard")
    tensors, c = parts(rule)
    assert not KernelDelta(c, torch.tensor([1.0]).double(), rule)(tensors).any()
    assert int((KernelDelta(c, torch.tensor([0.0]).double(), rule)(tensors) == 0).sum()) == 1


def test_nan_is_not_hidden():
    rule = Rule("distance", 2, "hard")
    tensors, c = parts(rule)
    with torch.no_grad():
        tensors[0][0, 2, 1] = float("nan")
    assert bool(KernelDelta(c, torch.tensor([0.5]).double(), rule)(tensors)[:, 2].isnan().all())


def test_points_that_coincide_have_finite_gradients():
    rule = Rule("mix", 2, "hard")
    tensors, c = parts(rule, ins=6, outs=6)
    with torch.no_grad():
        tensors[1].copy_(tensors[0])
    D = KernelDelta(c, torch.tensor([0.5]).double(), rule)(tensors)
    assert all(g.isfinite().all() for g in torch.autograd.grad(D.sum(), tensors))


def test_narrow_points_are_computed_in_float32():
    rule = Rule("mix", 2, "hard")
    tensors, c = parts(rule)
    narrow = [t.detach().bfloat16().requires_grad_() for t in tensors]
    s = torch.tensor([0.5])
    D = KernelDelta(c.bfloat16(), s, rule)(narrow)
    wide = [t.detach().float().requires_grad_() for t in narrow]
    expected = reference(wide, c.bfloat16().float(), s, rule)
    assert D.dtype == torch.float32
    torch.testing.assert_close(D, expected, rtol=1e-4, atol=1e-5)
    G = torch.randn_like(D)
    for one, other in zip(torch.autograd.grad(D, narrow, G), torch.autograd.grad(expected, wide, G), strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, rtol=2e-2, atol=1e-3)


def test_a_second_derivative_is_refused():
    rule = Rule("linear", 2, "none")
    tensors, c = parts(rule)
    with pytest.raises(RuntimeError, match="made from distances has no second derivative"):
        torch.autograd.grad(KernelDelta(c, c, rule)(tensors).sum(), tensors, create_graph=True)


@pytest.mark.slow
def test_more_entries_than_torch_quantile_takes():
    K = torch.randn(4096, 4100)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(K.abs().flatten(), 0.7)
    found = size_quantile(K, torch.tensor([0.7]))
    torch.testing.assert_close(found, reference_size_quantile(K, torch.tensor([0.7])))
