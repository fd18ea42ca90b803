"""SHiRA: its five masks."""

import pytest
import torch
from torch import nn

import loratory as lt
from tests.laws.kinds import LINEAR, Row, stacked

ROW = Row(
    made=lambda rank: {
        "SHiRA": lt.SHiRA(fraction=0.25, alpha=1.5),
        "SHiRA magnitudes": lt.SHiRA(mask="wm", fraction=0.25, cache_delta=True),
        "SHiRA gradients": lt.SHiRA(mask="grad", fraction=0.25),
        "SHiRA rows": lt.SHiRA(mask="struct", frequency=3, offset=1),
    },
    count=lambda site, rank: stacked(site) * round(0.25 * site.outputs * site.inputs),
    served=(*LINEAR, "experts", "experts transposed"),
    refusal="is not linear, and SHiRA is defined for linear layers alone",
)

PLANTED = [
    ("strength left out", "self.alpha * t.v", "t.v"),
    ("smallest entries", "descending=True", "descending=False"),
    ("gradient alone", "W * G if self.mask", "G if self.mask"),
    ("sums taken for sizes", '"gradient" if self.accumulate == "signed" else', '"gradient" if self.accumulate else'),
    ("no diagonal", "mask.diagonal().fill_(True)", "pass"),
    ("first row always", "[self.offset :: self.frequency]", "[:: self.frequency]"),
    ("places of the adapter before", "K * self.skip : K * (1 + self.skip)", ": K"),
]


def places(method, W, seen=None):
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
    layer.weight = nn.Parameter(W.clone())
    model = nn.Sequential(layer)
    lt.adapt(model, method, "0", seed=1, **({} if seen is None else {"seen": lt.collect(model, *seen)}))
    return layer.loratory["default"].places.tolist()


W = torch.tensor([[1.0, -9, 2], [8, 0, -3]])


def test_masks_by_hand():
    assert places(lt.SHiRA(mask="wm", fraction=2 / 6), W) == [1, 3]
    assert places(lt.SHiRA(mask="wm", fraction=2 / 6, skip=1), W) == [2, 5]
    x = torch.tensor([[1.0, 0.1, 5]])

    def total(model, batch):
        return model(batch).sum()  # the gradient of each row is x

    seen = ([x], total, {"gradient"})
    assert places(lt.SHiRA(mask="grad", fraction=2 / 6), W, seen) == [2, 5]
    assert places(lt.SHiRA(mask="snip", fraction=2 / 6), W, seen) == [2, 5]
    assert places(lt.SHiRA(mask="snip", fraction=3 / 6), W, seen) == [2, 3, 5]
    assert places(lt.SHiRA(mask="struct", frequency=2, offset=1), W) == [0, 3, 4, 5]
    assert places(lt.SHiRA(mask="struct", frequency=3, axis="columns", offset=2), W) == [0, 2, 4, 5]


def test_gradients_or_their_sizes_are_summed():
    batches = [torch.tensor([[1.0, 0, 4]]), torch.tensor([[1.0, 0, -5]])]  # each is the gradient of every row

    def total(model, batch):
        return model(batch).sum()

    signed = lt.SHiRA(mask="grad", fraction=2 / 6)
    assert places(signed, W, (batches, total, "gradient")) == [0, 3]
    sizes = lt.SHiRA(mask="grad", fraction=2 / 6, accumulate="abs")
    assert places(sizes, W, (batches, total, "absolute_gradient")) == [2, 5]
    snip = lt.SHiRA(mask="snip", fraction=3 / 6, accumulate="abs")
    assert places(snip, W, (batches, total, {"gradient", "absolute_gradient"})) == [2, 3, 5]
    with pytest.raises(ValueError, match="SHiRA needs the absolute_gradient, but only gradient was collected"):
        places(sizes, W, (batches, total, "gradient"))
    with pytest.raises(ValueError, match="SHiRA needs training batches for its start"):
        places(signed, W)


def test_it_is_no_low_rank_adapter(tmp_path):
    model = nn.Sequential(nn.Linear(20, 16))
    lt.adapt(model, lt.SHiRA(fraction=0.1), "0")
    with torch.no_grad():
        model[0].loratory["default"].v.normal_()
    with pytest.raises(ValueError, match="no place for SHiRA, whose update is not of low rank; write the merged model"):
        lt.export(model, tmp_path / "a", to="peft")
    D = model[0].loratory["default"].method.delta(model[0].loratory["default"])
    s = torch.linalg.svdvals(D.detach())
    left = s[2:].norm() / s.norm()  # what a LoRA of rank 2 cannot hold
    with pytest.raises(ValueError, match=f"relative error {float(left):.3g} in total.*this is above limit=0.05"):
        lt.export(model, tmp_path / "a", to="peft", rank=2)
    assert not (tmp_path / "a").exists()
    exported = lt.export(model, tmp_path / "a", to="peft", rank=2, limit=1)
    assert exported.total == pytest.approx(float(left), rel=1e-5)


def test_random_places_are_k_different_ones_and_a_seed_fixes_them():
    big = torch.randn(30, 20)
    found = places(lt.SHiRA(rank=2), big)
    assert len(set(found)) == 2 * 50
    assert found == sorted(found) == places(lt.SHiRA(rank=2), big)


def test_equal_scores_go_by_place():
    assert places(lt.SHiRA(mask="wm", fraction=0.5), torch.ones(2, 4)) == [0, 1, 2, 3]


def test_the_update_is_the_values_times_the_strength():
    layer = nn.Linear(3, 2, bias=False)
    model = nn.Sequential(layer)
    before = layer.weight.detach().clone()
    lt.adapt(model, lt.SHiRA(mask="wm", fraction=2 / 6, alpha=0.5), "0")
    t = layer.loratory["default"]
    with torch.no_grad():
        t.v.copy_(torch.tensor([2.0, 4.0]))
    lt.merge(model, probe=torch.randn(2, 3))
    change = (layer.weight.detach() - before).flatten()
    torch.testing.assert_close(change[t.places], torch.tensor([1.0, 2.0]))
    assert int((change != 0).sum()) == 2


def test_struct_counts():
    model = nn.Sequential(nn.Linear(40, 60))
    lt.adapt(model, lt.SHiRA(mask="struct", frequency=20), "0")  # rows 0, 20, 40: two of them cross the diagonal
    assert lt.summary(model).trained == 3 * 40 + 40 - 2


def test_places_take_four_bytes():
    model = nn.Sequential(nn.Linear(40, 60))
    lt.adapt(model, lt.SHiRA(), "0")
    assert model[0].loratory["default"].places.dtype == torch.int32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": 1}, "skip is 1, but mask 'rand' does not use it; leave it out, or take mask wm or grad or snip"),
        ({"mask": "struct", "rank": 4}, "rank is 4, but mask 'struct' does not use it"),
        ({"mask": "struct", "fraction": 0.1}, "fraction is 0.1, but mask 'struct' does not use it"),
        ({"mask": "wm", "offset": 2}, "offset is 2, but mask 'wm' does not use it; leave it out, or take mask struct"),
        ({"mask": "struct", "offset": 0.5}, "offset is 0.5; it must be an integer, at least 0"),
        ({"mask": "wm", "skip": -1}, "skip is -1; it must be an integer, at least 0"),
        ({"accumulate": "mean"}, "accumulate is 'mean'; it must be one of signed, abs"),
        ({"mask": "top"}, "mask is 'top'; it must be one of rand, wm"),
        ({"fraction": 0}, "fraction is 0"),
        ({"fraction": 1.5}, r"fraction is 1.5; it must lie in \(0, 1\]"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lt.SHiRA(**options)


def test_more_entries_than_there_are():
    with pytest.raises(ValueError, match="rank 40 asks for 5120 trainable entries but the layer has 4096"):
        lt.adapt(nn.Sequential(nn.Linear(64, 64)), lt.SHiRA(rank=40), "0")
