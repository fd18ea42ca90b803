"""LoLDU: hand examples of the factorisation, its starts, and weak pivots."""

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.ops.ldu import ldu
from tests.laws.kinds import Row, stacked
from tests.methods.test_lora import adapted

ROW = Row(
    made=lambda rank: {
        "LoLDU": lt.LoLDU(rank=rank, alpha=3),
        "LoLDU normal": lt.LoLDU(rank=rank, alpha=3, start="normal", basis="weight"),
    },
    count=lambda site, rank: stacked(site) * rank,
    start=0.0,
)

PLANTED = [
    ("pivots not centred", "* (t.z - t.z0), t.U", "* t.z, t.U"),
    ("scale forgotten", "scale(self.alpha, t.z.shape[-1], False) * (t.z - t.z0)", "(t.z - t.z0)"),
    ("rows not permuted", "f.PL[..., :rank]", "f.L[..., :rank]"),
    ("last pivots", "f.D[..., :rank]", "f.D[..., -rank:]"),
    ("starts exchanged", "if self.start in KEPT else D", "if self.start not in KEPT else D"),
    ("L in the file all the same", "frozen(L, rebuilt=made)", "frozen(L)", "tests/store/test_made_again.py"),
    ("pivots decayed", '"z": trained(z, decay=False)', '"z": trained(z)'),
]


@pytest.mark.parametrize(
    ("W", "order", "L", "D", "U"),
    [
        ([[4.0, 3], [6, 3]], [1, 0], [[1.0, 0], [2 / 3, 1]], [6.0, 1], [[1.0, 0.5], [0, 1]]),
        ([[0.0, 2, 4], [1, 1, 1]], [1, 0], [[1.0, 0], [0, 1]], [1.0, 2], [[1.0, 1, 1], [0, 1, 2]]),
        ([[2.0, 1], [2, 1]], [0, 1], [[1.0, 0], [1, 1]], [2.0, 1], [[1.0, 0.5], [0, 0]]),  # a zero pivot
    ],
)
def test_hand_examples(W, order, L, D, U):
    W = torch.tensor(W)
    for found, expected in zip(ldu(W), (order, L, D, U), strict=True):
        torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (3, 6, 6), (2, 3, 9, 2)])
def test_the_factors_are_those_of_torch(shape):
    W = torch.randn(shape).double()
    P, L, U = torch.linalg.lu(W)
    f = ldu(W)
    torch.testing.assert_close(torch.eye(shape[-2]).double()[f.order].mT, P)
    torch.testing.assert_close(f.L, L)
    torch.testing.assert_close(f.D.unsqueeze(-1) * f.U, U)
    torch.testing.assert_close(f.PL @ torch.diag_embed(f.D) @ f.U, W)


def test_linear_is_the_formula():
    x = torch.randn(3, 7).double()
    model, t = adapted(nn.Linear(7, 5), lt.LoLDU(rank=2, alpha=6))
    assert {n: tuple(v.shape) for n, v in t.items()} == {"L": (5, 2), "U": (2, 7), "z0": (2,), "z": (2,)}
    W = model[0].weight + 6 / 2 * t["L"] @ torch.diag(t["z"] - t["z0"]) @ t["U"]
    torch.testing.assert_close(model(x), x @ W.T + model[0].bias)


@pytest.mark.parametrize("start", ["lu", "constant", "normal", "uniform"])
def test_starts_that_keep_the_function(start):
    layer = nn.Linear(6, 8)
    x = torch.randn(3, 6)
    before = layer(x)
    model = nn.Sequential(layer)
    lt.adapt(model, lt.LoLDU(rank=4, start=start), "0", seed=1)
    assert torch.equal(model(x), before)
    t, D = layer.loratory["default"], ldu(layer.weight.detach()).D[:4]
    assert torch.equal(t.z, t.z0)
    if start == "lu":
        torch.testing.assert_close(t.z.detach(), D)
    elif start == "constant":
        torch.testing.assert_close(t.z.detach(), D.mean().expand(4))
    elif start == "uniform":
        assert float(t.z.detach().abs().max()) <= float(D.mean().abs()) / 2


@pytest.mark.parametrize("start", ["ones", "zeros", "standard-normal", "standard-uniform"])
def test_starts_that_change_it(start):
    layer = nn.Linear(6, 8, bias=False)
    W = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    lt.adapt(model, lt.LoLDU(rank=4, alpha=4, start=start), "0", seed=1)
    t, f = layer.loratory["default"], ldu(W)
    torch.testing.assert_close(t.z0, f.D[:4])
    PL, U = f.PL[:, :4], f.U[:4]
    expected = W - PL @ torch.diag(f.D[:4]) @ U + PL @ torch.diag(t.z.detach()) @ U
    lt.merge(model, probe=torch.randn(2, 6))
    torch.testing.assert_close(layer.weight, expected)


def test_all_pivots_and_a_scale_of_one_hold_the_whole_weight():
    layer = nn.Linear(6, 6, bias=False)
    model = nn.Sequential(layer)
    lt.adapt(model, lt.LoLDU(alpha=6, start="zeros"), "0")
    x = torch.randn(4, 6)
    torch.testing.assert_close(model(x), torch.zeros(4, 6), rtol=0, atol=1e-6)


def test_a_layer_with_zero_rows_starts_finite():
    layer = nn.Linear(6, 8)
    with torch.no_grad():
        layer.weight[2:].zero_()
    model = nn.Sequential(layer)
    lt.adapt(model, lt.LoLDU(rank=6), "0")
    assert all(bool(torch.isfinite(v).all()) for v in layer.loratory["default"].tensors().values())


def test_pivots_are_not_decayed():
    model = nn.Sequential(nn.Linear(6, 8))
    lt.adapt(model, lt.LoLDU(rank=2), "0")
    assert [g["weight_decay"] for g in lt.param_groups(model, weight_decay=0.1)] == [0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be a positive integer"),
        ({"alpha": -1}, "alpha is -1; it must be a positive"),
        ({"start": "random"}, "start is 'random'; it must be one of lu, constant"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lt.LoLDU(**options)


def test_a_rank_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"layer '0' .* so rank 6 is too large \(at most 5\)"):
        lt.adapt(nn.Sequential(nn.Linear(7, 5)), lt.LoLDU(rank=6), "0")
