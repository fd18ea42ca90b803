"""Combining adapters and changing ranks: what the numbers are, and that the stated error is the true one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loratory as lt
from loratory.runtime.combine import SCHEMES
from loratory.runtime.layer import layers_of
from loratory.runtime.low_rank import update
from tests.laws.kinds import KINDS, Case, move
from tests.laws.table import CASES
from tests.runtime.models import IDS, Tiny


def updates(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {n: update(layer, layer[name]).double() for n, layer in layers_of(model).items() if name in layer}  # type: ignore[arg-type]


def total(model: nn.Module, weights: dict[str, float]) -> dict[str, Tensor]:
    """The weighted sum of the adapters' updates."""
    out: dict[str, Tensor] = {}
    for name, w in weights.items():
        for layer, D in updates(model, name).items():
            out[layer] = out.get(layer, torch.zeros_like(D)) + w * D
    return out


def three() -> Tiny:
    model = Tiny().eval()
    for i, (name, method, where) in enumerate(
        [
            ("a", lt.LoRA(rank=2, alpha=3), "all-linear"),
            ("b", lt.LoRA(rank=2, rslora=True, alpha=2), "attention, embed"),
            ("c", lt.DoRA(rank=3), "mlp"),
        ]
    ):
        lt.adapt(model, method, where, name=name)
        move(model, seed=i)
    return model


SETTINGS: dict[str, Any] = {
    how: {"density": 0.5} if how.removesuffix("_svd") not in ("linear", "cat", "svd") else {} for how in SCHEMES
}


@pytest.mark.parametrize("how", SCHEMES)
def test_the_stated_error_is_the_true_one(how: str):
    model = three()
    record = lt.combine(model, ["a", "b"], "new", how, weights=[0.5, 2.0], seed=0, **SETTINGS[how])
    assert lt.active(model) == ("new",)
    wanted, found = total(model, {"a": 0.5, "b": 2.0}), updates(model, "new")
    assert set(found) == set(wanted) == set(record.layers)
    errors = {n: (found[n] - D).norm() for n, D in wanted.items()}
    for n, D in wanted.items():
        assert record.layers[n] == pytest.approx(float(errors[n] / D.norm()), rel=1e-4, abs=1e-6)
        assert record.ranks[n] == layers_of(model)[n]["new"].A.shape[-2]  # type: ignore[union-attr]
    whole = torch.stack(list(errors.values())).norm() / torch.stack([D.norm() for D in wanted.values()]).norm()
    assert record.total == pytest.approx(float(whole), rel=1e-4, abs=1e-6)
    assert record.layers[record.worst] == max(record.layers.values())
    if how in ("cat", "linear"):
        assert (record.total < 1e-6) is (how == "cat")
    assert f"'new' = {how} of 0.5 a, 2 b: {len(wanted)} layers of rank" in str(record)


@pytest.mark.parametrize("case", CASES)
def test_every_method_on_every_layer(case: Case):
    """cat and svd of full rank are exact for whatever has an update; svd of a rank is the nearest."""
    model = case.moved(torch.float64, name="a")
    lt.adapt(model, lt.LoRA(rank=1), case.kind.where[-1:], name="b")
    move(model, seed=5)
    x = case.inputs(torch.float64)
    lt.use(model, "a", "b", mix=[0.5, -1.0])
    wanted = model(x)
    sums = total(model, {"a": 0.5, "b": -1.0})
    record = lt.combine(model, ["a", "b"], "full", "svd", weights=[0.5, -1.0], rank=100)
    assert record.total < 1e-9
    torch.testing.assert_close(model(x), wanted)
    if type(case.method).factors is not lt.Method.factors:
        record = lt.combine(model, ["a", "b"], "cat", "cat", weights=[0.5, -1.0])
        assert record.total < 1e-9
        torch.testing.assert_close(model(x), wanted)
    record = lt.combine(model, ["a", "b"], "one", "svd", weights=[0.5, -1.0], rank=1)
    for n, D in sums.items():
        s = torch.linalg.svdvals(D)
        optimum = float(s[..., 1:].norm() / s.norm())
        assert record.layers[n] == pytest.approx(optimum, abs=1e-9)
        assert set(record.ranks.values()) == {1}


def test_the_others_and_the_base_stay(tmp_path: Path):
    model = three()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    lt.combine(model, ["a", "b"], "new", "svd", rank=2)
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in before.items())
    assert lt.trained(model) == {}
    out = model(IDS)
    lt.save(model, tmp_path / "new")
    fresh = Tiny().eval()
    lt.load(fresh, tmp_path / "new")
    assert torch.equal(fresh(IDS), out)
    lt.combine(model, ["a"], "copy", "cat", trainable=True)
    assert len(lt.trained(model)) == 2 * 13
    lt.detach(model)
    assert torch.equal(model(IDS), Tiny().eval()(IDS))


def test_dare_draws_from_the_seed_and_keeps_the_expectation():
    model = three()
    for name in ("one", "two"):
        lt.combine(model, ["a", "b"], name, "dare_linear_svd", density=0.5, seed=3, rank=8)
    assert all(torch.equal(D, updates(model, "two")[n]) for n, D in updates(model, "one").items())
    lt.combine(model, ["a", "b"], "other", "dare_linear_svd", density=0.5, seed=4, rank=8)
    assert not torch.equal(updates(model, "other")["head"], updates(model, "one")["head"])


@pytest.mark.parametrize(
    ("names", "options", "kind", "message"),
    [
        (["a", "z"], {}, ValueError, r"there is no adapter 'z'"),
        ("ab", {}, TypeError, r"names is a str; give a list of adapter names"),
        ([], {}, ValueError, r"names is \[\]; give each adapter once, at least one"),
        (["a", "a"], {}, ValueError, r"give each adapter once"),
        (["a", "b"], {"how": "mean"}, ValueError, r"how is 'mean'; it must be one of linear, cat, svd, ties"),
        (["a", "b"], {"weights": [1.0]}, ValueError, r"weights holds 1 numbers for 2 adapters \(a, b\); give one each"),
        (["a", "b"], {"weights": [1.0, float("inf")]}, ValueError, r"weights holds inf for adapter 'b'"),
        (["a", "b"], {"how": "ties"}, ValueError, r"density is None; how='ties' needs the share of numbers to keep, in \(0, 1\]"),
        (["a", "b"], {"how": "ties", "density": 0.0}, ValueError, r"density is 0.0; how='ties' needs"),
        (["a", "b"], {"density": 0.5}, ValueError, r"density is 0.5, but how='linear' keeps all numbers"),
        (["a", "b"], {"rank": 4}, ValueError, r"rank is 4, but how='linear' has the rank of its adapters"),
        (["a", "b"], {"how": "svd", "rank": 0}, ValueError, r"rank is 0; it must be a positive integer"),
        (["a", "b"], {"sign": "mean"}, ValueError, r"sign is 'mean'; it must be one of total, frequency"),
        (["a", "c"], {}, ValueError, r"layer 'blocks.0.up_proj': DoRA has no low-rank form, which how='linear' works on; use how='svd'"),
        (["a", "c"], {"how": "cat"}, ValueError, r"DoRA has no low-rank form, which how='cat' works on"),
        (["a", "b", "wide"], {}, ValueError, r"layer 'blocks.0.attn.q_proj' has ranks 2, 2, 4 in the adapters, and how='linear' sums"),
        (["a", "whole"], {}, ValueError, r"adapter 'whole' trains 'head.weight' in full, which a LoRA cannot hold"),
        (["a", "all"], {"how": "svd"}, ValueError, r"adapter 'all' trains 'embed.weight' in full"),
        (["a", "b"], {"into": "c"}, ValueError, r"the adapter name 'c' is taken"),
    ],
)  # fmt: skip
def test_refusals(names: Any, options: dict[str, Any], kind: type[Exception], message: str):
    model = three()
    lt.adapt(model, lt.LoRA(rank=4), "q_proj", name="wide")
    lt.adapt(model, lt.LoRA(rank=2), "q_proj", name="whole", also_train="head")
    lt.adapt(model, lt.Full(), name="all")
    lt.use(model, "a")
    before = model(IDS)
    with pytest.raises(kind, match=message):
        lt.combine(model, names, options.pop("into", "new"), options.pop("how", "linear"), **options)
    assert "new" not in lt.adapters(model)
    assert torch.equal(model(IDS), before)


# another rank


def test_a_lower_rank_is_the_nearest():
    model = three()
    lt.use(model, "a")
    lt.adapt(model, lt.LoRA(rank=5, alpha=3, dropout=0.25, lr_ratio=4), "all-linear", name="d")
    move(model, seed=9)
    D = updates(model, "d")
    record = lt.change_rank(model, 2)
    for n, now in updates(model, "d").items():
        U, s, Vh = torch.linalg.svd(D[n])
        torch.testing.assert_close(now, U[:, :2] * s[:2] @ Vh[:2], rtol=1e-4, atol=1e-5)
        assert record.layers[n] == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-5)
        assert record.ranks[n] == 2
    assert lt.active(model) == ("d",)
    t: Any = layers_of(model)["head"]["d"]
    assert t.method == lt.LoRA(rank=2, dropout=0.25, lr_ratio=4)
    groups = lt.param_groups(model, lr=1.0)
    assert {g["lr"] for g in groups} == {1.0, 4.0}
    assert len(lt.trained(model)) == 2 * 13


def test_a_higher_rank_is_the_same_update_and_learns_more():
    model = three()
    lt.use(model, "b")
    D, out = updates(model, "b"), model(IDS)
    record = lt.change_rank(model, 4, seed=1)
    assert record.total == 0.0
    torch.testing.assert_close(model(IDS), out)
    assert all(torch.allclose(now, D[n], atol=1e-6) for n, now in updates(model, "b").items())
    optimizer = torch.optim.SGD(lt.param_groups(model, lr=0.05))
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()
    assert all(int(torch.linalg.matrix_rank(now, rtol=1e-5)) > 2 for n, now in updates(model, "b").items())


def test_another_rank_under_another_name_from_any_method(tmp_path: Path):
    model = three()
    before = updates(model, "c")
    record = lt.change_rank(model, 2, name="c", into="small")
    assert lt.active(model) == ("small",)
    assert 0 < record.total < 1
    for n, D in before.items():
        assert torch.equal(updates(model, "c")[n], D)
        s = torch.linalg.svdvals(D)
        assert record.layers[n] == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-4)
    assert lt.change_rank(model, 100, name="c", into="exact").total < 1e-6
    out = model(IDS)
    lt.use(model, "c")
    torch.testing.assert_close(model(IDS), out)
    lt.change_rank(model, 1, name="small")
    lt.save(model, tmp_path / "small", name="small")
    fresh = Tiny().eval()
    lt.load(fresh, tmp_path / "small")
    lt.use(model, "small")
    assert torch.equal(fresh(IDS), model(IDS))
    assert lt.inspect(tmp_path / "small").hyperparameters["rank"] == 1


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda m: lt.change_rank(m, 0, name="a"), ValueError, r"rank is 0; it must be a positive integer"),
        (lambda m: lt.change_rank(m, 2.0, name="a"), TypeError, r"rank is 2.0; it must be a positive integer"),
        (lambda m: lt.change_rank(m, 2, name="z"), ValueError, r"there is no adapter 'z'"),
        (lambda m: lt.change_rank(m, 2, name="c"), ValueError, r"adapter 'c' is a DoRA, whose rank cannot be changed in place; only LoRA's can: give into="),
        (lambda m: lt.change_rank(m, 2, name="a", into="b"), ValueError, r"the adapter name 'b' is taken"),
    ],
)  # fmt: skip
def test_refused_ranks(change: Callable[[nn.Module], Any], kind: type[Exception], message: str):
    model = three()
    before = model(IDS)
    with pytest.raises(kind, match=message):
        change(model)
    assert torch.equal(model(IDS), before)


def test_a_broken_adapter_is_refused():
    model = three()
    lt.use(model, "a")
    with torch.no_grad():
        lt.trained(model)["layers/head/A"][0, 0] = float("nan")
    message = r"layer 'head': tensor A of its adapter holds NaN or infinity; go back to the last good checkpoint"
    for how in ("linear", "svd"):
        with pytest.raises(ValueError, match=message):
            lt.combine(model, ["a", "b"], "new", how)
    with pytest.raises(ValueError, match=message):
        lt.change_rank(model, 1)


def test_inside_rows_and_merged():
    model = three()
    with lt.rows(model, ["a", "b"]):
        with pytest.raises(RuntimeError, match="changing a rank must wait"):
            lt.change_rank(model, 1, name="a")
        with pytest.raises(RuntimeError, match="adding an adapter must wait"):
            lt.combine(model, ["a", "b"], "new")
    lt.merge(model, probe=IDS)
    with pytest.raises(RuntimeError, match="the model is merged"):
        lt.change_rank(model, 1, name="a")
    with pytest.raises(RuntimeError, match="the model is merged"):
        lt.combine(model, ["a", "b"], "new")


def test_kinds_are_covered():
    assert {case.values[0].kind.layers for case in CASES} == {kind.layers for kind in KINDS.values()}
