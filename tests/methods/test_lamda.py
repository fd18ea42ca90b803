"""LaMDA: its starts, the columns of B that are frozen step by step, and LaMDA++'s ranks."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.runtime.layer import layers_of
from tests.laws.kinds import Row, stacked

ROW = Row(
    made=lambda rank: {
        "LaMDA": lt.LaMDA(rank=rank, alpha=3, eta=1),
        "LaMDA released": lt.LaMDA(rank=rank, alpha=5, start="released", eta=1),
    },
    count=lambda site, rank: stacked(site) * (rank * rank + rank * site.outputs),
    stepped=("S",),  # where there is one step alone, B is frozen in it
)

PLANTED = [
    ("factor rank missing", 'rank if self.schedule == "linear" else 1', "1"),
    ("released rule with the factor rank", 'rank if self.schedule == "linear" else 1', "rank"),
    ("a step late by rounding", "pace * step * BILLION // (_billionths(self.eta) * steps)", "int(pace * step / (self.eta * steps))"),
    ("one step late", "run.step + 1, run.steps, rank", "run.step, run.steps, rank"),
    ("never frozen whole", "run.rest(t.B)", "pass"),
    ("moments kept", "run.optimizer.state.pop(t.B, None)", "pass"),
    ("gradients masked alone", "run.hold(t.B, columns)", "pass"),
    ("updates masked alone", "t.progress[0] = without_gradient", "pass"),
    ("last columns first", ">= t.progress[0]", "< rank - t.progress[0]"),
    ("start not taken away", "BS = BS - t.BS0", "pass"),
    ("singular values on A too", "A.copy_(Vh)", "A.copy_(D.unsqueeze(-1) * Vh)"),
    ("start without the scale", "D / scale(self.alpha, rank, False)", "D"),
    ("scale forgotten", "(BS if s == 1 else s * BS), t.A", "BS, t.A"),
    ("A trained", '"A": frozen(A)', '"A": trained(A)'),
    ("S's start as wide as A's", "S.uniform_(-(rank**-0.5), rank**-0.5", "S.uniform_(-(site.inputs**-0.5), site.inputs**-0.5"),
    ("released: all of B rests a step early", "was < rank == columns", "False"),
    ("columns thaw", "max(was, t.method.frozen_columns", "max(0, t.method.frozen_columns"),
    ("energy from the largest value on", "square[..., least:]", "square[..., :least]"),
    ("energy in place of its share", "(1 - residual**2) * float(square[..., least:].sum()) / held", "float(square[..., least:].sum())"),
    ("projection types in one budget", 'if self.allocation == "type" else', "if False else"),
]  # fmt: skip


def layer_with(method: lt.LaMDA, seed: int = 0) -> tuple[nn.Linear, nn.Sequential]:
    torch.manual_seed(seed)
    layer = nn.Linear(9, 12)
    model = nn.Sequential(layer)
    lt.adapt(model, method, "0", seed=1)
    return layer, model


def test_the_spectral_start():
    torch.manual_seed(0)
    layer = nn.Linear(7, 9)
    W, x = layer.weight.detach().clone(), torch.randn(5, 7)
    base, model = layer(x), nn.Sequential(layer)
    lt.adapt(model, lt.LaMDA(rank=3, alpha=6), "0")
    t = layer.loratory["default"]
    assert {n: tuple(v.shape) for n, v in t.tensors().items()} == {
        "A": (3, 7), "S": (3, 3), "B": (9, 3), "BS0": (9, 3), "progress": (3,),
    }  # fmt: skip
    assert list(lt.trained(model)) == ["layers/0/S", "layers/0/B"]
    assert torch.equal(model(x), base)
    D = torch.linalg.svdvals(W)
    torch.testing.assert_close(t.A @ t.A.T, torch.eye(3))
    torch.testing.assert_close(t.B.T @ t.B, torch.eye(3))
    torch.testing.assert_close(2 * t.S.detach(), torch.diag(D[:3]))
    torch.testing.assert_close((W - 2 * t.B @ t.S @ t.A).norm(), D[3:].norm())
    left = float(D[3:].norm() / D.norm())
    assert f"leave out of W (Frobenius): {left:.3g} on average" in str(lt.summary(model))


def test_the_other_starts():
    for method in (lt.LaMDA(rank=40, core_start="zero"), lt.LaMDA(rank=40, start="released")):
        torch.manual_seed(0)
        layer, x = nn.Linear(400, 300), torch.randn(2, 400)
        base, model = layer(x), nn.Sequential(layer)
        lt.adapt(model, method, "0", seed=1)
        t = layer.loratory["default"]
        assert set(t.tensors()) == {"A", "S", "B", "progress"}
        assert torch.equal(model(x), base)
        if method.core_start == "zero":
            assert not bool(t.S.any())
            continue
        assert not bool(t.B.any())
        for matrix, fan_in in ((t.A, 400), (t.S, 40)):
            bound = fan_in**-0.5
            assert 0.95 * bound < matrix.detach().abs().max().item() <= bound
            assert matrix.detach().std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("start", ["spectral", "released"])
def test_linear_is_the_formula(start):
    x, model = torch.randn(3, 7).double(), nn.Sequential(nn.Linear(7, 5)).double()
    lt.adapt(model, lt.LaMDA(rank=2, alpha=6, start=start), "0")
    t = {n: v for n, v in model[0].loratory["default"].tensors().items() if n != "progress"}
    with torch.no_grad():
        for tensor in t.values():
            tensor.normal_()
    W = model[0].weight + 6 / 2 * (t["B"] @ t["S"] - t.get("BS0", 0)) @ t["A"]
    torch.testing.assert_close(model(x), x @ W.T + model[0].bias)


@pytest.mark.parametrize(
    ("rank", "eta", "steps"), [(4, 0.3, 40), (7, 0.3, 10), (3, 1.0, 12), (5, 0.07, 100), (8, 0.55, 100)]
)
def test_columns_rest_one_after_the_other(rank, eta, steps):
    layer, model = layer_with(lt.LaMDA(rank=rank, eta=eta, alpha=3))
    t = layer.loratory["default"]
    optimizer = torch.optim.AdamW(lt.param_groups(model, lr=1e-2, weight_decay=0.1))
    lt.drive(model, optimizer, steps=steps)
    A, counts = t.A.clone(), []
    for step in range(1, steps + 1):
        S, B = t.S.detach().clone(), t.B.detach().clone()
        for _ in range(2):  # accumulated
            (model(torch.randn(4, 9)) ** 2).sum().backward()
        without = (t.B.grad == 0).all(0)
        if step == 2 and rank > 1:
            assert bool(optimizer.state[t.B]["exp_avg"].any())
        optimizer.step()
        optimizer.zero_grad()
        still = (t.B == B).all(0)
        assert torch.equal(still, without)
        assert not torch.equal(t.S, S)
        c = int(still.sum())
        assert still.tolist() == [True] * c + [False] * (rank - c)  # from the largest singular value on
        counts.append(c)
    share = Fraction(str(eta))
    assert counts == [min(rank, math.floor(rank * step / (share * steps))) for step in range(1, steps + 1)]
    assert counts == sorted(counts)
    assert counts[math.ceil(share * steps) - 1] == rank
    assert t.B not in optimizer.state
    assert torch.equal(t.A, A)
    assert torch.equal(layer.weight, layer_with(t.method)[0].weight)


def test_momentum_and_decay_do_not_move_a_frozen_column():
    for cls, options in ((torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {}), (torch.optim.RMSprop, {"momentum": 0.9})):  # fmt: skip
        layer, model = layer_with(lt.LaMDA(rank=4, eta=1.0))
        t = layer.loratory["default"]
        optimizer = cls(lt.param_groups(model, lr=1e-2, weight_decay=0.5), **options)
        lt.drive(model, optimizer, steps=8)
        for step in range(1, 8):
            B = t.B.detach().clone()
            (model(torch.randn(4, 9)) ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert (t.B == B).all(0).tolist() == [j < step // 2 for j in range(4)], cls.__name__


def test_the_released_rule_freezes_gradients_and_comes_to_its_end_late():
    rule = lt.LaMDA(schedule="released", eta=0.3)
    assert max(rule.frozen_columns(step, 1000, 32) for step in range(1, 1001)) == 3
    layer, model = layer_with(lt.LaMDA(rank=2, schedule="released", eta=0.2))
    t = layer.loratory["default"]
    optimizer = torch.optim.AdamW(lt.param_groups(model, lr=1e-2, weight_decay=0.1))
    lt.drive(model, optimizer, steps=10)
    gradient, moved = [], []
    for _ in range(10):
        B = t.B.detach().clone()
        (model(torch.randn(4, 9)) ** 2).sum().backward()
        gradient.append((t.B.grad != 0).any(0).tolist())
        optimizer.step()
        optimizer.zero_grad()
        moved.append((t.B != B).any(0).tolist())
    both, second, none = [True, True], [False, True], [False, False]
    assert gradient == [both, second, second, both, *[none] * 6]
    assert moved == [both] * 4 + [none] * 6


def test_the_layers_input_is_not_kept_for_the_backward_pass():
    kept = []
    layer = nn.Linear(64, 48)
    model = nn.Sequential(layer)
    lt.adapt(model, lt.LaMDA(rank=2), "0")
    x = torch.randn(10, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x).sum()
    assert sum(t.numel() for t in kept if t.shape[0] == 10) == 10 * 2
    assert not [t for t in kept if t.numel() >= x.numel() and t.data_ptr() == x.data_ptr()]


def test_plain_lora_holds_it_exactly(tmp_path):
    _, model = layer_with(lt.LaMDA(rank=3, alpha=6))
    with torch.no_grad():
        for p in lt.trained(model).values():
            p += torch.randn_like(p)
    x = torch.randn(5, 9)
    out = model(x)
    result = lt.export(model, tmp_path / "lora", "peft", rank=3)
    assert result.total == 0.0
    assert set(result.ranks.values()) == {3}
    with lt.disabled(model):
        again = nn.Sequential(nn.Linear(9, 12))
        again.load_state_dict({n: p for n, p in model.state_dict().items() if "loratory" not in n})
    lt.load(again, tmp_path / "lora")
    torch.testing.assert_close(again(x), out)


# -- a run that goes on ------------------------------------------------------------------------------------------------


def begun(folder, done: int = 6, steps: int = 20, rank: int = 4) -> None:
    """An adapter after some steps of a run."""
    _, model = layer_with(lt.LaMDA(rank=rank, eta=0.5))
    run_on(model, done, steps)
    lt.save(model, folder)


def run_on(model: nn.Module, count: int, steps: int, **options) -> list[int]:
    t = model[0].loratory["default"]
    optimizer = torch.optim.AdamW(lt.param_groups(model, lr=1e-2, weight_decay=0.1))
    lt.drive(model, optimizer, steps=steps, **options)
    counts = []
    for _ in range(count):
        B = t.B.detach().clone()
        (model(torch.randn(4, 9)) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(int((t.B == B).all(0).sum()))
    return counts


def loaded(folder) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 12))
    lt.load(model, folder, trainable=True)
    return model


def test_a_run_goes_on_with_its_frozen_columns(tmp_path):
    begun(tmp_path)
    assert run_on(loaded(tmp_path), 4, 20, step=6) == [2, 3, 3, 4]


def test_another_schedule_is_refused(tmp_path):
    begun(tmp_path)
    model = loaded(tmp_path)
    optimizer = torch.optim.AdamW(lt.param_groups(model))
    with pytest.raises(
        ValueError,
        match=r"layer '0': LaMDA's run began with 20 steps and eta 0.5, and now has 40 and 0.5; give loratory.drive what it began with, "
        r"or reschedule=True",
    ):
        lt.drive(model, optimizer, steps=40, step=6)
    with pytest.raises(
        ValueError, match=r"2 columns of LaMDA's B are frozen, and step 1 of 20 has 0; give loratory.drive step="
    ):
        lt.drive(model, optimizer, steps=20)
    layers_of(model)["0"]["default"].method = lt.LaMDA(rank=4, eta=0.6)
    with pytest.raises(ValueError, match=r"eta 0.5, and now has 20 and 0.6"):
        lt.drive(model, optimizer, steps=20, step=6)


def test_on_request_a_schedule_changes_and_frozen_columns_stay(tmp_path):
    begun(tmp_path)
    assert run_on(loaded(tmp_path), 10, 40, step=6, reschedule=True) == [2, 2, 2, 2, 2, 2, 2, 2, 3, 3]
    assert run_on(loaded(tmp_path), 12, 20, reschedule=True) == [2, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 4]


def test_a_drive_without_a_step_binds_nobody():
    _, model = layer_with(lt.LaMDA(rank=4))
    optimizer = torch.optim.AdamW(lt.param_groups(model))
    lt.drive(model, optimizer, steps=2)
    lt.drive(model, optimizer, steps=100)
    assert model[0].loratory["default"].progress.tolist() == [0, 0, 0]
    with pytest.raises(
        ValueError, match=r"LaMDA freezes B over the first 0.3 of the run; give steps= to loratory.drive"
    ):
        lt.drive(model, optimizer)


# -- LaMDA++ -----------------------------------------------------------------------------------------------------------


def with_spectra(*spectra: list[float], width: int = 8) -> nn.Sequential:
    """One layer for each list of singular values."""
    torch.manual_seed(0)
    layers = []
    for values in spectra:
        layer = nn.Linear(width, width, bias=False)
        U, V = (torch.linalg.qr(torch.randn(width, width)).Q for _ in range(2))
        layer.weight = nn.Parameter(U @ torch.diag(torch.tensor(values + [0.0] * (width - len(values)))) @ V)
        layers.append(layer)
    return nn.Sequential(*layers)


def ranks_of(model: nn.Module) -> list[int]:
    return [layer["default"].A.shape[-2] for layer in layers_of(model).values()]


def test_the_weights_with_most_between_the_candidates_get_the_largest_ranks(tmp_path):
    flat, steep, between = [1.0] * 8, [9.0, 1, 1, 1, 1, 1, 1, 1], [3.0] * 6
    model = with_spectra(flat, steep, between)
    lt.adapt(model, lt.LaMDA(rank=4, candidates=(2, 4, 6)))
    assert ranks_of(model) == [4, 2, 6]  # shares 4/8, 4/88, 4/6
    assert "share of |W|^2 between ranks 2 and 6: 0.404 on average, at most 0.667 (layer '2')" in str(lt.summary(model))
    assert lt.summary(model).trained == sum(r * r + 8 * r for r in (4, 2, 6))
    scaled = with_spectra(flat, [100 * s for s in steep], between)
    lt.adapt(scaled, lt.LaMDA(candidates=[2, 4, 6]))
    assert ranks_of(scaled) == [4, 2, 6]
    lt.save(model, tmp_path)
    again = with_spectra(flat, steep, between)
    lt.load(again, tmp_path)
    assert ranks_of(again) == [4, 2, 6]
    assert again[2].loratory["default"].method == lt.LaMDA(rank=6)


def test_each_projection_type_may_have_a_budget_of_its_own():
    def model() -> nn.ModuleDict:
        q, v = with_spectra([1.0] * 8, [2.0] + [1.0] * 7), with_spectra([50.0] + [1.0] * 7, [99.0] + [1.0] * 7)
        return nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"q": q[i], "v": v[i]}) for i in range(2))})

    both, each = model(), model()
    lt.adapt(both, lt.LaMDA(candidates=(2, 4)))
    lt.adapt(each, lt.LaMDA(candidates=(2, 4), allocation="type"))
    found = {name: layer["default"].A.shape[-2] for name, layer in layers_of(both).items()}
    assert found == {"blocks.0.q": 4, "blocks.0.v": 2, "blocks.1.q": 4, "blocks.1.v": 2}
    found = {name: layer["default"].A.shape[-2] for name, layer in layers_of(each).items()}
    assert found == {"blocks.0.q": 4, "blocks.0.v": 4, "blocks.1.q": 2, "blocks.1.v": 2}


def test_a_layer_with_settings_of_its_own_keeps_them():
    model = with_spectra([1.0] * 8, [9.0, 1], [3.0] * 6)
    lt.adapt(model, lt.LaMDA(candidates=(2, 6)), per_layer={"2": {"rank": 3, "candidates": None}})
    assert ranks_of(model) == [6, 2, 3]


def test_counts_of_candidates_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    lt.adapt(model, lt.LaMDA(candidates=(2, 4)))
    assert sorted(ranks_of(model)) == [2, 2, 4, 4]


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be a positive integer"),
        ({"alpha": -1}, "alpha is -1; it must be a positive"),
        ({"dropout": 1}, "dropout is 1; it must lie in"),
        ({"eta": 0}, "eta is 0; it must lie in"),
        ({"eta": 1.1}, r"eta is 1.1; it must lie in \(0, 1\]"),
        ({"start": "svd"}, "start is 'svd'; it must be one of spectral, released"),
        ({"core_start": "one"}, "core_start is 'one'; it must be one of spectral, zero"),
        ({"schedule": "cosine"}, "schedule is 'cosine'; it must be one of linear, released"),
        ({"allocation": "layer"}, "allocation is 'layer'; it must be one of global, type"),
        ({"start": "released", "core_start": "zero"}, "where B is 0 too, so nothing would ever learn"),
        ({"candidates": (4, 4)}, r"candidates is \(4, 4\); it must hold at least two ranks, each larger than the one before"),
        ({"candidates": (8, 4)}, r"candidates is \(8, 4\); it must hold at least two ranks"),
        ({"candidates": [4]}, r"candidates is \(4,\); it must hold at least two ranks"),
        ({"candidates": (0, 4)}, r"candidates is \(0, 4\); each must be a positive integer"),
        ({"candidates": [None, 4]}, r"candidates is \(None, 4\); each must be a positive integer"),
        ({"candidates": (2, 6), "rank": 5}, r"candidates is \(2, 6\) with mean 4; their mean must be the target rank \(5\)"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lt.LaMDA(**options)


def test_bad_kinds_are_refused():
    with pytest.raises(TypeError, match="candidates is 16; it must be a list of ranks"):
        lt.LaMDA(candidates=16)
    with pytest.raises(TypeError, match=r"eta is '0.3'; it must be a number in"):
        lt.LaMDA(eta="0.3")


def test_a_rank_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"layer '0' has 7 inputs and 5 outputs, so rank 6 is too large \(at most 5\)"):
        lt.adapt(nn.Sequential(nn.Linear(7, 5)), lt.LaMDA(rank=6), "0")
    with pytest.raises(
        ValueError, match=r"candidate rank 6 exceeds layer '0' \(max 5\); lower candidates, or leave the layer out"
    ):
        lt.adapt(nn.Sequential(nn.Linear(7, 5)), lt.LaMDA(candidates=(2, 6)), "0")
