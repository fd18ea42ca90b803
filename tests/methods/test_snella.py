"""SNELLA: its start, its memory, and how layers compete for what they keep."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.runtime.layer import layers_of
from tests.laws.kinds import LINEAR, Row, move, stacked
from tests.plan.measured import rise

ROW = Row(
    made=lambda rank: {
        "SNELLA": lt.SNELLA(rank=2 * rank, sparsity=0.3),
        "SNELLA kept": lt.SNELLA(rank=2 * rank, sparsity=0.3, target=None, norm=1, zero_start=True, cache_delta=True),
        "SNELLA distances": lt.SNELLA(rank=2 * rank, kernel="distance", sparsify=False, zero_start=True),
        "SNELLA linear": lt.SNELLA(rank=2 * rank - 1, kernel="linear", sparsify=False),
    },
    count=lambda site, rank: stacked(site) * (2 * rank * (site.inputs + site.outputs) + 3),
    served=(*LINEAR, "experts", "experts transposed"),
    refusal="is not linear, and SNELLA is defined for linear layers alone",
    slope=lambda method: 0.5 if method.sparsify else 1.0,  # of K |K| the second factor counts as a constant
    far=0.6,  # entries enter squared
    start=0.2,  # the update starts small in a wide layer, not at 0
)

PLANTED = [
    ("one sign for both heads", "c[1:].neg_()", "c[1:]"),
    ("bound without the width", "1 / math.sqrt(points.shape[-2] * width)", "1 / math.sqrt(points.shape[-2])"),
    ("decay of the scalars", "trained(m, decay=False)", "trained(m)"),
    ("the base dropped too", "with_delta(x, u, base", "with_delta(u, u, base"),
    ("samples not scaled up", "u * F.dropout(u.new_ones(samples), self.drop_path, True)", "u * F.dropout(u.new_ones(samples), self.drop_path, True).sign()"),
    ("entries dropped instead of samples", "samples = (u.shape[0], *(1,) * (u.dim() - 1)) if u.dim() > 1 else (1,)", "samples = u.shape"),
    ("gradient alone", "else p * p.grad)", "else p.grad)"),
    ("nan in the importance", "torch.where(seen.isnan(), torch.zeros_like(seen), seen)", "seen"),
    ("swings about the mean before", "(seen - mean).abs(), alpha=1 - self.uncertainty_beta", "seen, alpha=1 - self.uncertainty_beta"),
    ("one running mean's share for both", "swing.mul_(self.uncertainty_beta)", "swing.mul_(self.importance_beta)"),
    ("linear fall", "(1 - gone) ** 3", "(1 - gone)"),
    ("first warm-up one epoch short", "epoch <= self.warmup_initial", "epoch < self.warmup_initial"),
    ("last warm-up one epoch early", "epoch > epochs - self.warmup_final", "epoch >= epochs - self.warmup_final"),
    ("every epoch", "epoch % self.interval == 0", "True"),
    ("allocated at the end", "run.step >= run.steps or run.step % length", "run.step % length"),
    ("scores of the inputs alone", "for p in (t.P, t.Q):\n                state =", "for p in (t.P,):\n                state ="),
]  # fmt: skip


def adapted(sizes: tuple[int, ...] = (6, 10, 5), seed: int = 1, **options) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(i, o) for i, o in pairwise(sizes)])
    lt.adapt(model, lt.SNELLA(**{"rank": 4} | options), seed=seed)
    return model


def tensors_of(model: nn.Module) -> list:
    return [layer["default"] for layer in layers_of(model).values()]


def trained_steps(model: nn.Module, count: int, epoch: int | None, steps: int | None = None, begin: int = 0):
    optimizer = torch.optim.Adam(lt.param_groups(model, lr=1e-2))
    drive = lt.drive(model, optimizer, steps=steps or count, epoch_steps=epoch)
    seen = []
    for step in range(begin, begin + count):
        seen.append(torch.cat([t.sparsity.clone() for t in tensors_of(model)]))
        work(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, drive, seen


def work(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, model[0].in_features, generator=generator)
    return (model(x) - x.sum(-1, keepdim=True)).square().mean()


# -- the update --------------------------------------------------------------------------------------------------------


def test_points_start_within_the_bound_of_their_own_side_and_scalars_at_one_one_zero():
    (t,) = tensors_of(adapted((300, 200), rank=8))
    for points, side in ((t.P, 300), (t.Q, 200)):
        assert points.shape == (2, side, 4)
        bound = 1 / math.sqrt(side * 4)
        assert 0.98 * bound < float(points.detach().abs().max()) <= bound
        assert abs(float(points.detach().mean())) < 0.05 * bound
    assert [float(v.detach()) for v in (t.alpha, t.gamma, t.beta)] == [1, 1, 0]
    torch.testing.assert_close(t.c, torch.tensor([0.1, -0.1]))


def test_a_wide_layer_is_changed_by_a_ten_thousandth_and_by_nothing_with_zero_start():
    torch.manual_seed(0)
    x = torch.randn(16, 768)
    model = nn.Sequential(nn.Linear(768, 768))
    before = model(x)
    changes = {}
    for name, options in {"small": {}, "none": {"zero_start": True}, "dense": {"zero_start": True, "sparsify": False}}.items():  # fmt: skip
        lt.adapt(model, lt.SNELLA(rank=32, sparsity=0.3, **options), name=name)
        t = layers_of(model)["0"][name]
        changes[name] = float((model(x) - before).norm() / before.norm())
        if name == "small":
            assert float(t.method.delta(t).abs().max()) < 3e-5
    assert 1e-6 < changes["small"] < 1e-3
    assert changes["none"] < 1e-6 > changes["dense"]


def test_from_a_start_of_zero_it_is_trained_all_the_same():
    model = adapted(zero_start=True, sparsity=0.2, target=None)
    first = work(model, 0).item()
    optimizer = torch.optim.Adam(lt.param_groups(model, lr=3e-2))
    for _ in range(60):
        optimizer.zero_grad()
        work(model, 0).backward()
        optimizer.step()
    assert work(model, 0).item() < 0.7 * first


@pytest.mark.parametrize("norm", [1, 2])
def test_the_kernel_has_a_rank_that_a_product_of_as_many_numbers_has_not(norm):
    for kernel, rank in (("distance", 64), ("linear", 8)):
        (t,) = tensors_of(adapted((64, 96), rank=8, kernel=kernel, norm=norm, sparsify=False))
        with torch.no_grad():
            for p in (t.P, t.Q):
                p.normal_(generator=torch.Generator().manual_seed(0))
        assert int(torch.linalg.matrix_rank(t.method.delta(t).double().detach(), rtol=1e-6)) == rank


def test_as_many_entries_are_left_as_the_sparsity_says():
    (t,) = tensors_of(adapted((40, 30), sparsity=0.75, target=0.9))
    assert int((t.method.delta(t) != 0).sum()) == 300
    t.sparsity.fill_(0.9)
    assert int((t.method.delta(t) != 0).sum()) == 120


def test_dropout_is_on_the_update_alone_and_the_recomputed_pass_draws_nothing():
    x = torch.randn(5, 4, 6)
    results = []
    for kept in (False, True):
        model = adapted((6, 10), sparsity=0.3, target=None, dropout=0.4, cache_delta=kept).train()
        move(model)
        (t,) = tensors_of(model)
        torch.manual_seed(5)
        u = x.clone().requires_grad_()
        y = model(u)
        (y**3).sum().backward()
        results.append([y.detach(), u.grad, *(p.grad for p in lt.trained(model).values())])
        torch.manual_seed(5)
        expected = nn.functional.linear(x, model[0].weight, model[0].bias) + nn.functional.dropout(x, 0.4) @ t.method.delta(t).T  # fmt: skip
        torch.testing.assert_close(y, expected)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_drop_path_leaves_out_whole_samples_in_training():
    model = adapted((6, 10), target=None, drop_path=0.5).train()
    move(model)
    x = torch.randn(40, 3, 6)
    (t,) = tensors_of(model)
    update = (x @ t.method.delta(t).T).detach()
    change = (model(x) - nn.functional.linear(x, model[0].weight, model[0].bias)).detach()
    gone = [torch.allclose(row, torch.zeros_like(row), atol=1e-6) for row in change]
    doubled = [torch.allclose(row, 2 * own, atol=1e-5) for row, own in zip(change, update, strict=True)]
    assert all(a != b for a, b in zip(gone, doubled, strict=True))
    assert 10 < sum(gone) < 30
    torch.testing.assert_close(model.eval()(x), nn.functional.linear(x, model[0].weight, model[0].bias) + update)


@pytest.mark.parametrize("drop", [0.0, 0.1])
def test_one_matrix_as_large_as_the_weight_is_alive_at_a_time(drop):
    model = nn.Sequential(nn.Linear(1024, 2048, bias=False))
    lt.adapt(model, lt.SNELLA(rank=8, sparsity=0.5, target=None, dropout=drop, drop_path=drop))
    x = torch.randn(4, 1024, requires_grad=True)
    y = model(x)  # what a first call alone allocates is none of the method's
    matrix = 4 * 1024 * 2048
    assert matrix < rise(lambda: model(x)) < 1.8 * matrix
    assert matrix < rise(lambda: y.sum().backward()) < 1.8 * matrix
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert max(t.numel() for t in kept if t.data_ptr() != model[0].weight.data_ptr()) < 1024 * 2048 / 50


def test_weight_decay_is_on_the_points_alone():
    groups = lt.param_groups(adapted((6, 10)), weight_decay=0.3)
    decay = {name.rpartition("/")[2]: g["weight_decay"] for g in groups for name in g["names"]}
    assert decay == {"P": 0.3, "Q": 0.3, "alpha": 0, "gamma": 0, "beta": 0}


# -- the competition ---------------------------------------------------------------------------------------------------


def test_the_volume_falls_along_a_cubic_between_the_warm_ups():
    method = lt.SNELLA(sparsity=0.1, target=0.6, warmup_initial=2, warmup_final=3, interval=2)
    found = [method.volume(e, 12, [600, 400]) for e in range(12)]
    falling = [(int(400 + 500 * (1 - (e - 2) / 7) ** 3), e % 2 == 0) for e in range(3, 10)]
    assert found == [(pytest.approx(900), False)] * 3 + falling + [(pytest.approx(400), True)] * 2


def test_layers_compete_and_the_last_epoch_has_the_target():
    model = adapted((6, 10, 5), target=0.8)
    start = [t.sparsity.clone() for t in tensors_of(model)]
    assert all(float(s) == 0 for s in start)
    _, drive, seen = trained_steps(model, 20, 2)
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))  # within an epoch
    assert not bool(seen[0].any())
    assert float(seen[-1][0]) != float(seen[-1][1])
    epochs, entries = 10, torch.tensor([60.0, 50.0])
    for epoch in range(1, epochs):
        volume, _ = drive.runs["default"][0].volume(epoch, epochs, [60, 50])
        assert volume - 2 < float(((1 - seen[2 * epoch]) * entries).sum()) <= volume + 1e-3
    after = torch.cat([t.sparsity for t in tensors_of(model)])
    assert torch.equal(after, seen[-1])  # the end of the run changes nothing


def test_importance_is_of_the_new_value_and_the_gradient_of_the_step():
    model = adapted((6, 10), importance_beta=0.8, uncertainty_beta=0.6)
    (t,) = tensors_of(model)
    optimizer = torch.optim.SGD(lt.param_groups(model, lr=0.5))
    lt.drive(model, optimizer, steps=100, epoch_steps=50)
    mean = swing = torch.zeros_like(t.P)
    for step in range(3):
        optimizer.zero_grad()
        work(model, step).backward()
        if step == 1:
            t.P.grad[0, 2, 1] = float("nan")
        optimizer.step()
        if step == 1:
            with torch.no_grad():
                t.P[0, 2, 1] = 0.1
        seen = (t.P * t.P.grad).abs().nan_to_num(nan=0.0).detach()
        mean = 0.8 * mean + 0.2 * seen
        swing = 0.6 * swing + 0.4 * (seen - mean).abs()
        state = optimizer.state[t.P]
        torch.testing.assert_close(state["importance"], mean)
        torch.testing.assert_close(state["uncertainty"], swing)
    assert {"importance", "uncertainty"} <= optimizer.state[t.Q].keys()
    assert not any("importance" in name for name in model.state_dict())


def test_magnitudes_can_stand_for_importance():
    model = adapted((6, 10), importance="magnitude")
    (t,) = tensors_of(model)
    optimizer, *_ = trained_steps(model, 1, 1, steps=5)
    torch.testing.assert_close(optimizer.state[t.Q]["importance"], 0.15 * t.Q.detach().abs())


def test_scores_are_shares_of_importance_times_swing_of_both_sides():
    model = adapted((6, 10, 5))
    optimizer, drive, _ = trained_steps(model, 3, 10, steps=100)
    method, run = drive.runs["default"]
    raw = [
        sum(float((optimizer.state[p]["importance"] * optimizer.state[p]["uncertainty"]).mean()) for p in (t.P, t.Q))
        for t in tensors_of(model)
    ]
    assert method.scores(run) == pytest.approx([r / sum(raw) for r in raw])
    for state in optimizer.state.values():
        if "importance" in state:
            state["importance"].zero_()
    assert method.scores(run) == [0.5, 0.5]


def test_each_expert_competes_for_itself():
    from tests.laws.kinds import KINDS, Case

    case = Case(KINDS["experts"], lt.SNELLA(rank=4, target=0.7), ROW)
    model = case.adapted().train()
    x = case.inputs()
    optimizer = torch.optim.Adam(lt.param_groups(model, lr=1e-2))
    lt.drive(model, optimizer, steps=6, epoch_steps=2)
    for _ in range(6):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for t in tensors_of(model):
        assert t.sparsity.shape == (3, 1)
        assert len(set(t.sparsity.flatten().tolist())) == 3
        kept = (t.method.delta(t) != 0).sum((-2, -1))
        expected = ((1 - t.sparsity.flatten()) * math.prod(t.shape[-2:])).round()
        assert bool(((kept - expected).abs() <= 1).all())


def test_a_run_that_goes_on_is_the_run_that_never_stopped(tmp_path):
    whole = adapted(target=0.8)
    _, _, sparsities = trained_steps(whole, 12, 2)
    model = adapted(target=0.8)
    optimizer, drive, _ = trained_steps(model, 6, 2, steps=12)
    lt.save(model, tmp_path)
    states = copy.deepcopy((optimizer.state_dict(), drive.state()))

    torch.manual_seed(0)
    again = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 5))
    lt.load(again, tmp_path, trainable=True)
    optimizer = torch.optim.Adam(lt.param_groups(again, lr=1e-2))
    with pytest.raises(
        RuntimeError, match=r"has seen no step of this optimizer; call loratory.drive with step=0, or put"
    ):
        lt.drive(again, optimizer, steps=12, epoch_steps=2, step=6)
    optimizer.load_state_dict(states[0])
    lt.drive(again, optimizer, steps=12, epoch_steps=2, step=6).restore(states[1])
    for step in range(6, 12):
        assert torch.equal(torch.cat([t.sparsity for t in tensors_of(again)]), sparsities[step])
        work(again, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(lt.trained(again).values(), lt.trained(whole).values(), strict=True):
        assert torch.equal(one, other)


def test_a_saved_adapter_holds_its_sparsity_and_not_what_training_kept(tmp_path):
    model = adapted(target=0.8)
    trained_steps(model, 8, 2)
    lt.save(model, tmp_path)
    torch.manual_seed(0)
    again = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 5))
    lt.load(again, tmp_path)
    for one, other in zip(tensors_of(again), tensors_of(model), strict=True):
        assert torch.equal(one.sparsity, other.sparsity)
        assert bool(one.sparsity.any())
        assert set(one.tensors()) == {"P", "Q", "c", "alpha", "gamma", "beta", "sparsity"}
    x = torch.randn(4, 6)
    assert torch.equal(again(x), model(x))


def test_an_epoch_is_a_hundredth_of_a_run_where_its_length_is_not_known():
    model = adapted(target=0.8)
    *_, seen = trained_steps(model, 9, None, steps=300)
    assert not bool(torch.stack(seen[:3]).any())
    assert [torch.equal(a, b) for a, b in pairwise(seen[2:])] == [False, True, True, False, True, True]


def test_a_matrix_that_keeps_nothing_is_at_rest():
    model = adapted((6, 10), target=None)
    (t,) = tensors_of(model)
    t.sparsity.fill_(1.0)
    work(model, 0).backward()
    assert not any(bool(p.grad.any()) for p in lt.trained(model).values())
    assert not bool(t.method.delta(t).any())


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 7}, "rank is 7; it must be divisible by the 2 kernel heads"),
        ({"rank": 0}, "rank is 0; it must be a positive integer"),
        ({"kernel": "gauss"}, "kernel is 'gauss'; it must be one of mix, distance, linear"),
        ({"norm": 3}, "norm is 3; it must be one of 1, 2"),
        ({"threshold": "firm"}, "threshold is 'firm'; it must be one of hard, soft"),
        ({"sparsity": 1.0}, r"sparsity is 1.0; it must lie in \[0, 1\)"),
        ({"target": -0.1}, r"target is -0.1; it must lie in \[0, 1\)"),
        ({"importance_beta": 0.0}, r"importance_beta is 0.0; it must lie in \(0, 1\)"),
        ({"uncertainty_beta": 1}, r"uncertainty_beta is 1; it must lie in \(0, 1\)"),
        ({"interval": 0}, "interval is 0"),
        ({"warmup_initial": -1}, "warmup_initial is -1"),
        ({"drop_path": 1}, r"drop_path is 1; it must lie in \[0, 1\)"),
        ({"target": 0.9, "least_kept": 0.2}, r"least_kept is 0.2; it must lie in \[0, 0.1\], what the sparsity leaves"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lt.SNELLA(**options)


def test_a_target_below_the_start_is_said():
    with pytest.warns(UserWarning, match=r"target \(0.2\) is below its sparsity \(0.4\): the update becomes denser"):
        lt.SNELLA(sparsity=0.4, target=0.2)


def test_without_drive_the_first_step_says_so():
    model = adapted()
    optimizer = torch.optim.Adam(lt.param_groups(model))
    work(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"layer '0': SNELLA acts during training; call loratory.drive"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({}, None, "SNELLA's sparsity follows the length of the run; give steps= to loratory.drive"),
        (
            {"warmup_initial": 2, "warmup_final": 3},
            20,
            r"warmup_initial \(2\) and warmup_final \(3\) leave no epochs for the schedule of a run of 5; lower them",
        ),
    ],
)
def test_a_run_without_room_for_the_schedule_is_refused(options, steps, message):
    model = adapted(**options)
    with pytest.raises(ValueError, match=message):
        lt.drive(model, torch.optim.Adam(lt.param_groups(model)), steps=steps, epoch_steps=4)


def test_samples_of_a_bare_parameter_cannot_be_dropped():
    from tests.laws.kinds import KINDS

    model = nn.Sequential(*KINDS["bare parameter"].layers().values())
    with pytest.raises(
        ValueError, match="is a bare parameter, whose update cannot be dropped by sample; set drop_path=0"
    ):
        lt.adapt(model, lt.SNELLA(drop_path=0.1), parameters={"0.kernel": "in out"})


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_on_a_quantised_base_it_is_trained_and_merged(scheme):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))
    lt.quantize(model, scheme)
    lt.adapt(model, lt.SNELLA(rank=4, sparsity=0.3, target=None), "0, 2")
    move(model, far=1.0)
    x = torch.randn(5, 64, requires_grad=True)
    y = model(x)
    (y**2).sum().backward()
    assert all(bool(p.grad.any()) for p in lt.trained(model).values())
    W = [layer.site.read() + layer["default"].method.delta(layer["default"]) for layer in layers_of(model).values()]
    h = torch.tanh(nn.functional.linear(x, W[0], model[0].bias))
    torch.testing.assert_close(y, nn.functional.linear(h, W[1], model[2].bias), rtol=1e-4, atol=1e-4)


def test_the_summary_says_how_sparse_the_layers_are():
    model = adapted((6, 10, 5), sparsity=0.25)
    with torch.no_grad():
        tensors_of(model)[1].sparsity.fill_(0.75)
    assert "share of the update's entries at 0: 0.5 on average, at most 0.75 (layer '1')" in str(lt.summary(model))
    assert "entries at 0" not in str(lt.summary(adapted(sparsify=False)))
