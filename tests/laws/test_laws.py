"""The laws that every method keeps on every layer it serves."""

import copy

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.runtime.layer import layers_of
from tests.laws.kinds import EVERY, KINDS, Case, adapters_of, move, plain_state, same
from tests.laws.table import CASES, FIRST, REFUSED, TABLE

every = pytest.mark.parametrize("case", CASES)
each_method = pytest.mark.parametrize("case", FIRST)
COMPILED = ("Linear", "Conv1D of transformers", "Embedding", "Conv2d", "Conv2d grouped", "bare parameter")  # every day
each_compiled = pytest.mark.parametrize(
    "case",
    [
        case if case.values[0].kind in [KINDS[name] for name in COMPILED] else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)
        for case in FIRST
    ],
)  # fmt: skip


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return bool((a.double() - b.double()).abs().max() <= tolerance * (b.double().max() - b.double().min()))


def test_the_table_is_complete():
    for row in TABLE.values():
        assert set(row.served) <= set(EVERY)
        assert row.refusal or set(row.served) == set(EVERY)


@pytest.mark.parametrize("case", REFUSED)
def test_other_layers_are_refused_and_left_alone(case: Case):
    model = case.plain()
    before = repr(model)
    with pytest.raises(ValueError, match=f"layer 'first.*{case.row.refusal}.*exclude="):
        case.attach(model)
    assert repr(model) == before
    assert all(p.requires_grad for p in model.parameters())


@every
def test_function_is_unchanged_at_the_start(case: Case):
    x, start = case.inputs(), case.row.start
    assert close(case.adapted()(x), case.plain()(x), start(case.method) if callable(start) else start)


@every
def test_merge_equals_forward(case: Case):
    x, model = case.inputs(), case.moved()
    before = model(x)
    assert not close(before, case.plain()(x), 1e-2)  # the adapters do something
    check = lt.merge(model, probe=x)
    assert close(model(x), before, 1e-5)
    assert check.relative <= check.tolerance == 1e-5
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("weight"))


@every
def test_merged_weights_alone_give_the_same_function(case: Case):
    x, model = case.inputs(), case.moved()
    before = model(x)
    lt.merge(model, probe=x, keep_base=False)
    plain = case.plain()
    plain.load_state_dict(model.state_dict())
    assert [type(m) for m in model] == [type(m) for m in plain]
    assert close(plain(x), before, 1e-5)


@every
def test_detach_restores_the_base(case: Case):
    model, base = case.plain(), case.plain()
    model[0].requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    case.attach(model)
    assert same(plain_state(model), base.state_dict())
    move(model)
    lt.merge(model, probe=case.inputs())
    lt.detach(model)
    assert same(model.state_dict(), base.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert repr(model) == repr(base)
    assert torch.equal(model(case.inputs()), base(case.inputs()))


@every
def test_gradients_reach_exactly_the_declared_tensors(case: Case):
    model = case.moved().train()
    (model(case.inputs()) ** 2).sum().backward()
    declared = {id(t) for a in adapters_of(model).values() for t in a.trained().values()}
    reached = {id(p) for p in model.parameters() if p.grad is not None and bool((p.grad != 0).any())}
    touched = {id(p) for p in model.parameters() if p.grad is not None}
    assert declared == reached == touched == {id(p) for p in lt.trained(model).values()}
    assert all(torch.isfinite(p.grad).all() for p in lt.trained(model).values())


@every
def test_gradients_are_those_of_finite_differences(case: Case):
    """The derivative along a random direction, of the tensors whose gradient is that of the loss."""
    model = case.moved(torch.float64).train()
    x, parts = case.inputs(torch.float64), lt.trained(model)
    if case.row.sloped is not None:
        parts = {n: p for n, p in parts.items() if n.rpartition("/")[2] in case.row.sloped}
    direction = {n: torch.randn_like(p) for n, p in parts.items()}
    loss = (model(x) ** 3).sum()
    grads = torch.autograd.grad(loss, list(parts.values()))
    slope = sum((g * direction[n]).sum() for g, n in zip(grads, parts, strict=True))

    def at(step: float) -> torch.Tensor:
        with torch.no_grad():
            for n, p in parts.items():
                p += step * direction[n]
            out = (model(x) ** 3).sum()
            for n, p in parts.items():
                p -= step * direction[n]
        return out

    measured = (at(1e-5) - at(-1e-5)) / 2e-5
    torch.testing.assert_close(slope, case.row.slope(case.method) * measured, rtol=1e-5, atol=1e-5)


@every
def test_save_and_load_give_the_same_bits(case: Case, tmp_path):
    x, model = case.inputs(), case.moved()
    lt.save(model, tmp_path)
    again = case.plain()
    lt.load(again, tmp_path)
    for layer, adapter in adapters_of(model).items():
        loaded = adapters_of(again)[layer]
        assert same(adapter.tensors(), loaded.tensors())
        assert (adapter.tags, adapter.method) == (loaded.tags, loaded.method)
    assert torch.equal(again(x), model(x))
    assert not any(p.requires_grad for p in again.parameters())


@each_method
def test_stated_count_is_the_counted_one(case: Case):
    model = case.adapted()
    stated = sum(case.row.count(layer.site, case.kind.rank or 8) for layer in layers_of(model).values())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == stated
    assert lt.summary(model).trained == stated


@every
def test_two_adapters_do_not_disturb_each_other(case: Case):
    x, model = case.inputs(), case.moved(name="a")
    a, bits = model(x), {n: p.clone() for n, p in lt.trained(model).items()}
    case.attach(model, name="b")
    move(model, seed=4)
    b = model(x)
    assert not torch.equal(a, b)
    (model.train()(x) ** 2).sum().backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    lt.drive(model, optimizer, steps=1)
    optimizer.step()
    model.eval()
    lt.use(model, "a")
    assert same(lt.trained(model), bits)
    assert torch.equal(model(x), a)
    lt.detach(model, "b")
    assert lt.adapters(model) == ("a",)
    assert torch.equal(model(x), a)


@every
def test_deepcopy_is_independent(case: Case):
    x, model = case.inputs(), case.moved()
    before = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), before)
    move(twin, seed=5)
    lt.merge(twin, probe=x)
    assert not torch.equal(twin(x), before)
    assert torch.equal(model(x), before)
    assert lt.active(model) == ("default",)
    lt.detach(model)
    assert torch.equal(model(x), case.plain()(x))
    lt.unmerge(twin)
    assert len(lt.trained(twin)) > 0


@every
def test_bf16_survives(case: Case):
    x, model = case.inputs(torch.bfloat16), case.moved(torch.bfloat16)
    assert {p.dtype for p in lt.trained(model).values()} == {torch.float32}
    optimizer = torch.optim.AdamW(lt.param_groups(model, lr=1e-3))
    lt.drive(model, optimizer, steps=1)
    out = model.train()(x)
    assert out.dtype == torch.bfloat16
    (out.float() ** 2).mean().backward()
    before = {n: p.detach().clone() for n, p in lt.trained(model).items()}
    optimizer.step()
    after, stepped = lt.trained(model), case.row.stepped
    assert all(torch.isfinite(p).all() for p in after.values())
    moved = {n for n, p in after.items() if not torch.equal(p, before[n])}
    assert moved == {n for n in after if stepped is None or n.rpartition("/")[2] in stepped}
    y = model.eval()(x)
    assert bool(torch.isfinite(y).all())
    check = lt.merge(model, probe=x)
    assert close(model(x), y, 2e-2)
    assert check.relative <= check.tolerance == 2e-2


@every
def test_training_lowers_a_toy_loss(case: Case):
    x, model = case.inputs(), case.adapted().train()
    target = case.moved()(x).detach()
    optimizer = torch.optim.Adam(lt.param_groups(model, lr=1e-2))
    lt.drive(model, optimizer, steps=15)
    losses = []
    for _ in range(15):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@every
def test_mixing_is_the_weighted_sum_of_the_changes(case: Case):
    x, model = case.inputs(torch.float64), case.moved(torch.float64, name="a")
    case.attach(model, name="b")
    move(model, seed=4)
    W = {name: layer.site.read().clone() for name, layer in layers_of(model).items()}
    changes = {}
    for name in ("a", "b"):
        lt.use(model, name)
        lt.merge(model, probe=x)
        changes[name] = {layer: layers_of(model)[layer].site.read() - W[layer] for layer in W}
        changes[name] = {layer: change.clone() for layer, change in changes[name].items()}
        lt.unmerge(model)
    lt.use(model, "a", "b", mix=[0.7, -0.4])
    mixed = model(x)
    lt.merge(model, probe=x)
    for layer, base in W.items():
        expected = base + 0.7 * changes["a"][layer] - 0.4 * changes["b"][layer]
        torch.testing.assert_close(layers_of(model)[layer].site.read(), expected, rtol=1e-6, atol=1e-6)
    assert close(mixed, model(x), 1e-6)
    lt.unmerge(model)
    lt.use(model, "a", "b")
    lt.merge(model, probe=x)
    for layer, base in W.items():
        expected = base + changes["a"][layer] + changes["b"][layer]
        torch.testing.assert_close(layers_of(model)[layer].site.read(), expected, rtol=1e-6, atol=1e-6)


@each_method
def test_frozen_layers_below_still_pass_gradients_on(case: Case):
    """The gradient at the layer's input is that of the merged layer."""
    x, model = case.inputs(), case.moved()
    if not x.is_floating_point():
        model.train()(x).sum().backward()
        assert all(p.grad is not None for p in lt.trained(model).values())
        return
    x.requires_grad_()
    (ours,) = torch.autograd.grad((model(x) ** 2).sum(), x)
    lt.merge(model, probe=x.detach())
    (merged,) = torch.autograd.grad((model(x) ** 2).sum(), x)
    assert close(ours, merged, 1e-5)


@each_compiled
@pytest.mark.usefixtures("compiling")
def test_one_compiled_graph(case: Case):
    x, model = case.inputs(), case.moved(name="a")
    case.attach(model, name="b")
    move(model, seed=4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if "Linear" in repr(model) else "eager")
    for names, mix in ((("a",), None), (("b",), None), ((), None), (("a", "b"), (0.7, 0.3))):
        lt.use(model, *names, mix=mix)
        assert close(compiled(x), model(x), 1e-6)
