"""SVFit: its invariants, and a hand example."""

import pytest
import torch
from torch import nn

import loratory as lt
from tests.laws.kinds import EVERY, Row, stacked
from tests.methods.test_lora import adapted

ROW = Row(
    made=lambda rank: {"SVFit": lt.SVFit(rank=rank), "SVFit exact": lt.SVFit(rank=rank, svd="exact", basis="weight")},
    count=lambda site, rank: stacked(site) * rank,
    served=tuple(kind for kind in EVERY if kind != "Embedding"),
    refusal="is an embedding, whose singular values SVFit does not train",
    start=0.0,
)

PLANTED = [
    ("values not centred", "t.sigma - t.S, t.V", "t.sigma, t.V"),
    ("sign of the update", "t.sigma - t.S, t.V", "t.S - t.sigma, t.V"),
    ("values above 0 counted", "t.sigma < 0", "t.sigma > 0"),
    ("values decayed", "trained(S.clone(), decay=False)", "trained(S.clone())"),
    ("U trained", '"U": frozen(U.to(S), rebuilt=made)', '"U": trained(U.to(S))'),
    (
        "U in the file all the same",
        "frozen(U.to(S), rebuilt=made)",
        "frozen(U.to(S))",
        "tests/store/test_made_again.py",
    ),
    ("share without the square", "] = residual**2", "] = residual"),
]


def test_hand_example():
    layer = nn.Linear(3, 2, bias=False)
    layer.weight = nn.Parameter(torch.tensor([[3.0, 0, 0], [0, 2, 0]]))
    model = nn.Sequential(layer)
    lt.adapt(model, lt.SVFit(rank=1), "0")
    t = layer.loratory["default"]
    assert t.S.tolist() == pytest.approx([3.0])
    with torch.no_grad():
        t.sigma.fill_(5.0)
    out = model(torch.ones(1, 3))
    torch.testing.assert_close(out, torch.tensor([[5.0, 2.0]]))
    out.sum().backward()
    torch.testing.assert_close(t.sigma.grad, torch.ones(1))


def test_linear_is_the_formula():
    x = torch.randn(3, 7).double()
    model, t = adapted(nn.Linear(7, 5), lt.SVFit(rank=2))
    assert {n: tuple(v.shape) for n, v in t.items()} == {"U": (5, 2), "S": (2,), "V": (2, 7), "sigma": (2,)}
    W = model[0].weight + t["U"] @ torch.diag(t["sigma"] - t["S"]) @ t["V"]
    torch.testing.assert_close(model(x), x @ W.T + model[0].bias)


def test_gradient_and_singular_values_of_the_merged_weight():
    torch.manual_seed(0)
    layer = nn.Linear(6, 9, bias=False).double()
    W, x, model = layer.weight.detach().clone().requires_grad_(), torch.randn(8, 6).double(), nn.Sequential(layer)
    lt.adapt(model, lt.SVFit(rank=4), "0")
    t = layer.loratory["default"]
    eye = torch.eye(4).double()
    torch.testing.assert_close(t.U.T @ t.U, eye)
    torch.testing.assert_close(t.V @ t.V.T, eye)
    S = torch.linalg.svdvals(W.detach())
    torch.testing.assert_close(t.S, S[:4])
    with torch.no_grad():
        t.sigma.copy_(torch.tensor([1.5, -0.2, 0.7, 0.1]))
    dense = (W.detach() + t.U @ torch.diag(t.sigma.detach() - t.S) @ t.V).requires_grad_()
    ((x @ dense.T) ** 3).sum().backward()
    (model(x) ** 3).sum().backward()
    torch.testing.assert_close(t.sigma.grad, torch.diagonal(t.U.T @ dense.grad @ t.V.T))
    lt.merge(model, probe=x)
    expected = torch.cat([torch.tensor([1.5, 0.2, 0.7, 0.1]).double(), S[4:]]).sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight), expected)


def test_frozen_tensors_keep_their_bits_and_values_are_not_decayed():
    model = nn.Sequential(nn.Linear(6, 9))
    lt.adapt(model, lt.SVFit(rank=3), "0")
    t = model[0].loratory["default"]
    before = {n: v.clone() for n, v in t.tensors().items()}
    groups = lt.param_groups(model, lr=1e-2, weight_decay=0.5)
    assert [g["weight_decay"] for g in groups] == [0.0]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    assert [n for n, v in t.tensors().items() if not torch.equal(v, before[n])] == ["sigma"]


def test_the_summary_says_what_is_left_out():
    layer = nn.Linear(6, 9)
    S = torch.linalg.svdvals(layer.weight.detach())
    model = nn.Sequential(layer)
    lt.adapt(model, lt.SVFit(rank=2), "0")
    left = float(S[2:].square().sum() / S.square().sum())
    assert f"outside the trained singular values: {left:.3g} on average" in str(lt.summary(model))


def test_the_summary_counts_values_that_became_negative():
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6))
    lt.adapt(model, lt.SVFit(rank=3), ["0", "1"])
    assert "below 0" not in str(lt.summary(model))
    with torch.no_grad():
        model[1].loratory["default"].sigma[:2].neg_()
    assert "trained singular values below 0: 1 on average, at most 2 (layer '1')" in str(lt.summary(model))
    lt.use(model)
    assert "below 0" not in str(lt.summary(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be a positive integer"),
        ({"dropout": 1.5}, "dropout is 1.5; it must lie in"),
        ({"svd": "fast"}, "svd is 'fast'; it must be one of truncated, exact"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lt.SVFit(**options)


def test_a_rank_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"so rank 6 is too large \(at most 5\)"):
        lt.adapt(nn.Sequential(nn.Linear(7, 5)), lt.SVFit(rank=6), "0")
