"""DoRA against its formula written out, its invariant, and its constant row lengths."""

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.runtime.layer import layers_of
from tests.laws.kinds import KINDS, Case, Kind, Row, stacked
from tests.methods.test_lora import adapted

ROW = Row(
    made=lambda rank: {"DoRA": lt.DoRA(rank=rank, alpha=3), "rsDoRA": lt.DoRA(rank=rank, alpha=3, rslora=True)},
    count=lambda site, rank: stacked(site) * (rank * (site.inputs + site.outputs) + site.outputs),
    sloped=("m",),  # the row length is a constant in the gradient
)

PLANTED = [
    ("row length over the wrong axis", "vector_norm(V.detach(), dim=-1)", "vector_norm(V.detach(), dim=-2)"),
    ("dropout missing in the base term", "Wu = site.product(u)", "Wu = site.product(x)"),
    ("dropout missing in the low-rank term", "site.down(u, t.A", "site.down(x, t.A"),
    ("bias scaled too", "Wu = y if bias is None else y - bias", "Wu = y"),
    ("base counted twice", "(length - 1).to", "length.to"),
    (
        "sign in the merged weight",
        "V = W.to(t.A.dtype) + scale",
        "V = W.to(t.A.dtype) - scale",
        "tests/laws/test_laws.py::test_merge_equals_forward",
    ),
    ("row length decayed", "trained(m, decay=False)", "trained(m)"),
    ("length instead of its ratio", "length = site.along_out(t.m / c)", "length = site.along_out(t.m)"),
]


def test_linear_is_the_formula():
    x = torch.randn(3, 7).double()
    model, t = adapted(nn.Linear(7, 5), lt.DoRA(rank=2, alpha=6))
    assert {n: tuple(v.shape) for n, v in t.items()} == {"A": (2, 7), "B": (5, 2), "m": (5,)}
    V = model[0].weight + 6 / 2 * t["B"] @ t["A"]
    W = t["m"][:, None] * V / V.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model(x), x @ W.T + model[0].bias)
    lt.merge(model, probe=x)
    torch.testing.assert_close(model[0].weight, W)


def test_start_is_the_row_length():
    conv = nn.Conv2d(4, 6, 3, groups=2)
    model = nn.Sequential(conv)
    lt.adapt(model, lt.DoRA(rank=2), "0")
    m = conv.loratory["default"].m
    torch.testing.assert_close(m.detach(), conv.weight.detach().flatten(1).norm(dim=1).reshape(2, 3))


def test_gradients_take_the_row_length_as_a_constant():
    model, t = adapted(nn.Linear(7, 5), lt.DoRA(rank=2, alpha=6))
    x, g = torch.randn(3, 7).double().requires_grad_(), torch.randn(3, 5).double()
    model(x).backward(g)
    own, W = model[0].loratory["default"], model[0].weight
    V = W + 3 * t["B"] @ t["A"]
    c = V.norm(dim=1)
    scaled, xd = g * t["m"] / c, x.detach()
    torch.testing.assert_close(own.m.grad, (g * (xd @ V.T) / c).sum(0))
    torch.testing.assert_close(own.A.grad, 3 * t["B"].T @ scaled.T @ xd)
    torch.testing.assert_close(own.B.grad, 3 * scaled.T @ (xd @ t["A"].T))
    torch.testing.assert_close(x.grad, scaled @ V)


def test_with_dropout_both_terms_see_the_dropped_input():
    model, t = adapted(nn.Linear(200, 5), lt.DoRA(rank=2, alpha=6, dropout=0.4))
    x, W = torch.randn(3, 200).double(), model[0].weight
    V = W + 3 * t["B"] @ t["A"]
    ratio = t["m"] / V.norm(dim=1)
    torch.manual_seed(5)
    out = model.train()(x)
    torch.manual_seed(5)
    u = nn.functional.dropout(x, 0.4)
    expected = x @ W.T + model[0].bias + (ratio - 1) * (u @ W.T) + ratio * (3 * (u @ t["A"].T) @ t["B"].T)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(model.eval()(x), x @ (ratio[:, None] * V).T + model[0].bias)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_row_lengths_of_the_trained_weight_are_m(kind: Kind):
    case = Case(kind, lt.DoRA(rank=kind.rank, alpha=3), ROW)
    model, x = case.adapted(torch.float64).train(), case.inputs(torch.float64)
    optimizer = torch.optim.AdamW(lt.param_groups(model, lr=3e-2, weight_decay=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    lt.merge(model, probe=x)
    for layer in layers_of(model).values():
        m = layer["default"].m.detach()
        torch.testing.assert_close(layer.site.read().norm(dim=-1), m.abs())
        assert not torch.allclose(m, layer.unmerged.norm(dim=-1))


def test_the_length_is_not_decayed():
    model = nn.Sequential(nn.Linear(7, 5))
    lt.adapt(model, lt.DoRA(rank=2), "0")
    groups = {g["weight_decay"]: g["names"] for g in lt.param_groups(model, weight_decay=0.1)}
    assert groups == {0.1: ["layers/0/A", "layers/0/B"], 0.0: ["layers/0/m"]}


def test_the_length_is_float32_under_a_bfloat16_base():
    model = nn.Sequential(nn.Linear(7, 5)).bfloat16()
    lt.adapt(model, lt.DoRA(rank=2), "0")
    assert model[0].loratory["default"].m.dtype == torch.float32


def test_loading_keeps_the_trained_length(tmp_path):
    model, _ = adapted(nn.Linear(7, 5), lt.DoRA(rank=2))
    lt.save(model, tmp_path)
    again = nn.Sequential(nn.Linear(7, 5)).double()
    again.load_state_dict({k: v for k, v in model.state_dict().items() if "loratory" not in k})
    lt.load(again, tmp_path)
    assert torch.equal(again[0].loratory["default"].m, model[0].loratory["default"].m)


def test_a_zero_row_is_refused():
    layer = nn.Linear(7, 5)
    with torch.no_grad():
        layer.weight[3] = 0
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=r"layer '0' has a zero weight row \(3\).*exclude=, or use LoRA"):
        lt.adapt(model, lt.DoRA(rank=2), "0")
    assert type(model[0]) is nn.Linear
    lt.adapt(model, lt.LoRA(rank=2), "0")
