"""The laws of methods that put virtual tokens before a text or among patches, on every body they serve."""

import copy
from importlib import import_module

import pytest
import torch

import loratory as lt
from loratory.methods import METHODS as REGISTERED
from loratory.runtime.layer import layers_of
from tests.laws.bodies import (
    CAUSAL,
    FIRST,
    IDS,
    METHODS,
    VISION,
    VISION_METHODS,
    BodyRow,
    Case,
    cases,
    outputs,
)
from tests.laws.kinds import move, same


def slow(case):
    return pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)


ROWS: dict[type[lt.Method], BodyRow] = {
    cls: import_module(f"tests.methods.test_{cls.__module__.rsplit('.', 1)[-1]}").ROW
    for cls in REGISTERED.values()
    if cls.acts_on != "layers"
}
every = pytest.mark.parametrize("case", [case for row in ROWS.values() for case in row.cases()])
from_tokens = {"prompt": lt.PromptTuning(tokens=3, ids=FIRST), "prefix": lt.PrefixTuning(tokens=3, ids=FIRST)}


@pytest.mark.parametrize("case", cases(CAUSAL, from_tokens))
def test_from_token_ids_the_model_starts_as_after_these_tokens(case: Case):
    whole = torch.cat([torch.tensor([FIRST, FIRST]), IDS], 1)
    if case.make is CAUSAL["Mistral"] and isinstance(case.method, lt.PrefixTuning):
        whole = whole[:, :5]  # a prefix stays in sight where the window slides on
    expected = outputs(case.plain(), whole)[:, len(FIRST) :]
    found = outputs(case.adapted(), whole[:, len(FIRST) :])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@every
def test_the_start_changes_the_model_and_a_seed_fixes_it(case: Case):
    a, b, plain = case.plain(), case.plain(), case.plain()
    for model in (a, b):
        lt.adapt(model, case.method, seed=4)
    assert torch.equal(outputs(a), outputs(b))
    assert not torch.equal(outputs(a), outputs(plain))
    assert outputs(a).shape == outputs(plain).shape


@every
def test_detach_restores_the_base(case: Case):
    model, base = case.plain(), case.plain()
    next(model.parameters()).requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    lt.adapt(model, case.method)
    plain = {k: v for k, v in model.state_dict().items() if "loratory" not in k}
    assert same(plain, base.state_dict())
    move(model)
    lt.detach(model)
    assert same(model.state_dict(), base.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert repr(model) == repr(base)
    assert torch.equal(outputs(model), outputs(base))


@every
def test_gradients_reach_exactly_the_declared_tensors(case: Case):
    model = case.adapted().train()
    (outputs(model) ** 2).sum().backward()
    declared = {id(t) for layer in layers_of(model).values() for t in layer["default"].tensors().values()}
    reached = {id(p) for p in model.parameters() if p.grad is not None and bool((p.grad != 0).any())}
    touched = {id(p) for p in model.parameters() if p.grad is not None}
    assert declared == reached == touched == {id(p) for p in lt.trained(model).values()}


@every
def test_save_and_load_give_the_same_bits(case: Case, tmp_path):
    model = case.adapted()
    move(model)
    lt.save(model, tmp_path)
    again = case.plain()
    lt.load(again, tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    ((_, saved),), ((_, loaded),) = layers_of(model).items(), layers_of(again).items()
    assert same(saved["default"].tensors(), loaded["default"].tensors())
    assert (saved["default"].tags, saved["default"].method) == (loaded["default"].tags, loaded["default"].method)
    assert not any(p.requires_grad for p in again.parameters())
    assert lt.inspect(tmp_path).numbers == lt.summary(model).trained


@every
def test_stated_count_is_the_counted_one(case: Case):
    model = case.adapted()
    (layer,) = layers_of(model).values()
    site, method = layer.site, case.method
    stated = ROWS[type(method)].count(method, site)
    assert lt.summary(model).trained == stated == sum(p.numel() for p in model.parameters() if p.requires_grad)


@every
def test_two_adapters_do_not_disturb_each_other(case: Case):
    model = case.adapted(name="a")
    a, bits = outputs(model), {n: p.clone() for n, p in lt.trained(model).items()}
    lt.adapt(model, case.method, name="b")
    move(model)
    b = outputs(model)
    assert not torch.equal(a, b)
    (outputs(model.train()) ** 2).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.eval()
    lt.use(model, "a")
    assert same(lt.trained(model), bits)
    assert torch.equal(outputs(model), a)
    with lt.disabled(model):
        assert torch.equal(outputs(model), outputs(case.plain()))
    lt.detach(model, "b")
    assert lt.adapters(model) == ("a",)
    assert torch.equal(outputs(model), a)


@every
def test_deepcopy_is_independent(case: Case):
    model = case.adapted()
    before = outputs(model)
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin), before)
    move(twin)
    assert not torch.equal(outputs(twin), before)
    assert torch.equal(outputs(model), before)
    lt.detach(model)
    assert torch.equal(outputs(model), outputs(case.plain()))
    assert not torch.equal(outputs(twin), outputs(model))


@every
def test_bf16_survives(case: Case):
    model = case.adapted(torch.bfloat16)
    assert {p.dtype for p in lt.trained(model).values()} == {torch.float32}
    optimizer = torch.optim.AdamW(lt.param_groups(model, lr=1e-2))
    out = outputs(model.train())
    assert out.dtype == torch.bfloat16
    (out.float() ** 2).mean().backward()
    before = {n: p.detach().clone() for n, p in lt.trained(model).items()}
    optimizer.step()
    assert all(torch.isfinite(p).all() and not torch.equal(p, before[n]) for n, p in lt.trained(model).items())
    assert bool(torch.isfinite(outputs(model.eval())).all())


@every
def test_training_lowers_a_toy_loss(case: Case):
    other = case.adapted()
    move(other)
    target, model = outputs(other).detach(), case.adapted().train()
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    optimizer = torch.optim.Adam(lt.param_groups(model, lr=1e-2))
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.mse_loss(outputs(model), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@every
def test_merging_is_refused(case: Case, tmp_path):
    model = case.adapted()
    before = outputs(model)
    for act in (lambda: lt.merge(model), lambda: lt.export(model, tmp_path / "out")):
        with pytest.raises(ValueError, match=f"{type(case.method).__name__} changes more than a weight"):
            act()
    with pytest.raises(ValueError, match="holds virtual tokens, which are not written in PEFT's format; keep it with"):
        lt.export(model, tmp_path / "out", to="peft")
    assert torch.equal(outputs(model), before)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "case",
    [
        *cases({"Llama": CAUSAL["Llama"]}, METHODS),
        *cases({"ViT": VISION["ViT"]}, VISION_METHODS),
        *map(slow, cases({"GPT-2": CAUSAL["GPT-2"]}, METHODS)),
    ],
)
@pytest.mark.usefixtures("compiling")
def test_one_compiled_graph(case: Case):
    model = case.adapted(name="a")
    lt.adapt(model, case.method, name="b")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for names in (("a",), ("b",), ()):
        lt.use(model, *names)
        options = {"use_cache": False} if model.main_input_name == "input_ids" else {}
        torch.testing.assert_close(outputs(compiled, **options), outputs(model), rtol=1e-5, atol=1e-5)
