"""SALT: its core, its penalty, and the corner cases of k."""

import pytest
import torch
from torch import nn

import loratory as lt
from tests.laws.kinds import EVERY, Row, stacked


def count(site, rank):
    p = min(site.outputs, site.inputs)
    k = max(1, int(0.4 * p))
    return stacked(site) * (2 * k + 2 * rank * (p - k))


ROW = Row(
    made=lambda rank: {
        "SALT": lt.SALT(ratio=0.4, rank=rank),
        "SALT without relu": lt.SALT(ratio=0.4, rank=rank, relu="none", basis="weight"),
    },
    count=count,
    served=tuple(
        kind for kind in EVERY if kind not in ("Embedding", "Conv2d grouped", "Conv2d depthwise", "Conv3d grouped")
    ),
    refusal="which SALT has no form for",
    start=0.0,
)

PLANTED = [
    ("shift left out", "t.A * t.S[..., :k] + t.B)", "t.A * t.S[..., :k])"),
    ("tail without its values", "tail = torch.diag_embed(t.S[..., k:]) + t.X @ t.Y", "tail = t.X @ t.Y"),
    ("relu forgotten", "            N = torch.relu(N)\n        elif", "            N = N\n        elif"),
    ("start of X half as wide", "math.sqrt(6 / rank)", "math.sqrt(6 / rank) / 2"),
    ("penalty from zero", "t.A * S + t.B - S)", "t.A * S + t.B)"),
    ("penalty of X alone", "torch.linalg.vector_norm(t.X @ t.Y)", "torch.linalg.vector_norm(t.X)"),
    (
        "V in the file all the same",
        "frozen(Vh.to(S), rebuilt=made)",
        "frozen(Vh.to(S))",
        "tests/store/test_made_again.py",
    ),
    ("scale decayed", '"A": trained(A, decay=self.decay)', '"A": trained(A)'),
]


def salted(layer: nn.Module, **options):
    model = nn.Sequential(layer)
    lt.adapt(model, lt.SALT(**options), "0", seed=1)
    return model, layer.loratory["default"]


def by_hand(t, k):
    N = torch.zeros(t.S.numel(), t.S.numel(), dtype=t.S.dtype)
    N[:k, :k] = torch.diag(t.A * t.S[:k] + t.B)
    N[k:, k:] = torch.diag(t.S[k:]) + t.X @ t.Y
    return t.U @ torch.relu(N) @ t.V


@pytest.mark.parametrize(("inputs", "outputs"), [(7, 9), (9, 7)])
def test_weight_and_output_are_the_formula(inputs, outputs):
    layer = nn.Linear(inputs, outputs).double()
    model, t = salted(layer, top=3, rank=2)
    with torch.no_grad():
        for p in lt.trained(model).values():
            p += torch.randn_like(p)
    W = by_hand(t, 3)
    assert bool((t.method.core(t) < 0).any())  # relu has something to do
    x = torch.randn(4, inputs).double()
    torch.testing.assert_close(model(x), x @ W.T + layer.bias)
    lt.merge(model, probe=x)
    torch.testing.assert_close(layer.weight, W)


def test_start():
    layer = nn.Linear(40, 60)
    x = torch.randn(3, 40)
    before = layer(x)
    model, t = salted(layer)
    assert (t.A.numel(), t.X.shape) == (4, (36, 36))  # a tenth of 40; rank 256 capped
    assert torch.equal(model(x), before)
    assert lt.penalty(model).item() == 0.0
    bound = (6 / 36) ** 0.5
    assert 0.97 * bound < float(t.X.detach().abs().max()) <= bound
    assert float(t.Y.detach().abs().max()) == 0.0
    model, t = salted(nn.Linear(40, 60), start="normal", rank=20)
    assert t.Y.std().item() == pytest.approx(0.01, rel=0.1)
    assert not torch.equal(model(x), model[0].weight @ x[0])


def test_all_values_are_a_pure_scale_and_shift():
    layer = nn.Linear(5, 8, bias=False).double()
    model, t = salted(layer, ratio=1.0)
    assert set(lt.trained(model)) == {"layers/0/A", "layers/0/B"}
    S = t.S.clone()
    with torch.no_grad():
        t.A.fill_(2.0)
        t.B.fill_(0.5)
    lt.merge(model, probe=torch.randn(2, 5).double())
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight), 2 * S + 0.5)


def test_values_are_clamped_at_zero_and_no_other_entry_on_request():
    layer = nn.Linear(5, 8, bias=False).double()
    for relu, least in (("whole", 0.0), ("diagonal", None), ("none", None)):
        model, t = salted(layer, top=2, rank=2, relu=relu)
        with torch.no_grad():
            t.B.fill_(-100.0)
            t.X.fill_(1.0)
            t.Y.fill_(-1.0)
        core = t.method.factors(t)[1] + torch.diag(t.S)
        if relu == "none":
            assert float(torch.diagonal(core).min()) < -50
        else:
            assert torch.diagonal(core)[:2].abs().max() == 0
        off = core - torch.diag(torch.diagonal(core))
        assert (off.min() >= 0) == (least is not None)
        lt.detach(model)


def test_penalty_is_the_papers():
    model, t = salted(nn.Linear(6, 9), top=2, rank=3, regularizer=0.5)
    with torch.no_grad():
        t.A.copy_(torch.tensor([1.5, 0.5]))
        t.Y.normal_()
    expected = 0.5 * ((t.A * t.S[:2] + t.B - t.S[:2]).norm() + (t.X @ t.Y).norm())
    torch.testing.assert_close(lt.penalty(model), expected)
    model, _ = salted(nn.Linear(6, 9), regularizer=0.0)
    assert lt.penalty(model).item() == 0.0


def test_scale_and_shift_are_not_decayed_unless_asked():
    for decay, free in ((False, ["layers/0/A", "layers/0/B"]), (True, [])):
        model, _ = salted(nn.Linear(6, 9), decay=decay)
        groups = lt.param_groups(model, weight_decay=0.1)
        assert [name for g in groups if g["weight_decay"] == 0 for name in g["names"]] == free


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0}, "ratio is 0; it must lie in"),
        ({"ratio": 1.5}, r"ratio is 1.5; it must lie in \(0, 1\]"),
        ({"rank": 0}, "rank is 0; it must be a positive integer"),
        ({"top": 0}, "top is 0; it must be a positive integer"),
        ({"regularizer": -1}, "regularizer is -1; it must be a finite number, at least 0"),
        ({"relu": "all"}, "relu is 'all'; it must be one of whole, diagonal, none"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lt.SALT(**options)


def test_too_many_values_are_refused():
    with pytest.raises(ValueError, match=r"layer '0' has 5 singular values, so top 8 is too large; lower top"):
        salted(nn.Linear(5, 8), top=8)


def test_a_rank_beyond_what_is_left_is_said():
    with pytest.warns(UserWarning, match="layer '0': rank 7 is more than the 6 singular values that X Y updates"):
        lt.adapt(nn.Sequential(nn.Linear(8, 8)), lt.SALT(top=2, rank=7), "0")
