"""switch: what merge gives, written and taken out again entry by entry."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.runtime.layer import layers_of
from loratory.sites.linear import LinearSite
from tests.laws.kinds import KINDS, Case, move, plain_state, same
from tests.laws.test_laws import close
from tests.methods.test_shira import ROW
from tests.runtime.models import IDS, Tiny

METHODS = ROW.made(2)
CASES = [
    pytest.param(Case(KINDS[kind], method, ROW), id=f"{label}-{kind}")
    for label, method in METHODS.items()
    for kind in ROW.served
]


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every number of the base as its bits, so that -0 is not 0."""
    return {n: t.flatten().view(torch.uint8) for n, t in plain_state(model).items()}


def several() -> tuple[Tiny, dict[str, torch.Tensor]]:
    """A model with adapters a, b and c, of which a and b share places, and the base's bits."""
    model = Tiny().eval()
    with torch.no_grad():
        model.blocks[0].attn["q_proj"].weight[:2] = -0.0
    base = bits(model)
    for seed, (name, method) in enumerate(
        {"a": lt.SHiRA(mask="wm", fraction=0.1), "b": lt.SHiRA(mask="wm", fraction=0.2, alpha=2), "c": lt.SHiRA(fraction=0.3)}.items()
    ):  # fmt: skip
        lt.adapt(model, method, "attention", name=name, bias="adapted")
        move(model, seed)
    assert same(bits(model), base) is False  # biases of c are in
    lt.switch(model)
    assert same(bits(model), base)
    return model, base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_gives_the_bits_of_merge_and_takes_them_out(case: Case, dtype: torch.dtype):
    x, model = case.inputs(dtype), case.moved(dtype)
    base, before = bits(model), model(x)
    lt.merge(model, probe=x)
    merged = plain_state(model)
    lt.unmerge(model)
    lt.switch(model, "default")
    assert same(plain_state(model), merged)
    assert close(model(x), before, 1e-5 if dtype == torch.float32 else 2e-2)
    for layer in layers_of(model).values():
        assert layer.unmerged.numel() == layer["default"].v.numel() < layer.site.weight.numel()
    lt.unmerge(model)
    assert same(bits(model), base)
    assert torch.equal(model(x), before)


def test_the_bits_return_after_any_switches():
    model, base = several()
    alone = {}
    for name in "abc":
        lt.use(model, name)
        alone[name] = model(IDS)
    for names in ("a", "b", "ab", "c", "ba", "abc", "", "c", "a"):
        lt.switch(model, *names)
        assert lt.active(model) == tuple(names)
        if len(names) == 1:
            torch.testing.assert_close(model(IDS), alone[names], rtol=1e-5, atol=1e-5)
    assert not same(bits(model), base)
    lt.switch(model)
    assert same(bits(model), base)
    lt.use(model, "a")
    assert torch.equal(model(IDS), alone["a"])


def test_values_add_where_places_coincide():
    model, base = several()
    lt.use(model, "a", "b", mix=[0.5, -2])
    lt.merge(model, probe=IDS)
    expected = plain_state(model)
    lt.unmerge(model)
    lt.switch(model, "a", "b", mix=[0.5, -2])
    for name, W in plain_state(model).items():
        torch.testing.assert_close(W, expected[name])
    (layer, *_) = layers_of(model).values()
    assert set(layer["a"].places.tolist()) < set(layer["b"].places.tolist()) == set(layer.unmerged_at.tolist())
    lt.unmerge(model)
    lt.use(model)
    assert same(bits(model), base)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("loaded", [(), ("b",)])
def test_an_interrupted_switch_leaves_the_base(when: str, loaded: tuple[str, ...], monkeypatch: Any):
    model, base = several()
    lt.switch(model, *loaded)
    put, written = LinearSite.put, []

    def interrupted(site: LinearSite, places: torch.Tensor, numbers: torch.Tensor) -> None:
        if when == "after":
            put(site, places, numbers)
        written.append(site.name)
        if len(written) == 3 + len(layers_of(model)) * len(loaded):  # the third write of a
            raise KeyboardInterrupt
        if when == "before":
            put(site, places, numbers)

    monkeypatch.setattr(LinearSite, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lt.switch(model, "a")
    monkeypatch.undo()
    assert not any(layer.merged for layer in layers_of(model).values())
    assert lt.active(model) == ("a",)
    beside = model(IDS)
    lt.switch(model, "a")
    torch.testing.assert_close(model(IDS), beside, rtol=1e-5, atol=1e-5)
    lt.switch(model)
    assert same(bits(model), base)


def test_interrupted_while_taking_out_the_next_switch_still_knows_the_base(monkeypatch: Any):
    model, base = several()
    lt.switch(model, "b")
    put, written = LinearSite.put, []

    def interrupted(site: LinearSite, places: torch.Tensor, numbers: torch.Tensor) -> None:
        written.append(site.name)
        if len(written) == 2:
            raise KeyboardInterrupt
        put(site, places, numbers)

    monkeypatch.setattr(LinearSite, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lt.switch(model, "a")
    monkeypatch.undo()
    assert not same(bits(model), base)
    lt.switch(model)
    assert same(bits(model), base)


def test_a_merged_adapter_is_taken_out_first():
    model, base = several()
    lt.use(model, "b")
    lt.merge(model, probe=IDS)
    lt.switch(model, "a")
    lt.switch(model)
    assert same(bits(model), base)


def test_a_switched_model_is_a_merged_one_to_all_others(tmp_path: Any):
    model, base = several()
    lt.switch(model, "a")
    for what, call in {
        "switching adapters": lambda: lt.use(model, "b"),
        "merged already": lambda: lt.merge(model),
        "serving rows": lambda: lt.rows(model, [None] * len(IDS)).__enter__(),
    }.items():
        with pytest.raises(RuntimeError, match=f"(?s)merged.*{what}|{what} with a"):
            call()
    lt.save(model, tmp_path, name="a")
    fresh = Tiny().eval()
    with torch.no_grad():
        fresh.blocks[0].attn["q_proj"].weight[:2] = -0.0
    lt.load(fresh, tmp_path)  # the file names the base, not what is in it
    torch.testing.assert_close(fresh(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    twin = copy.deepcopy(model)
    lt.switch(twin, "c")
    lt.switch(twin)
    assert same(bits(twin), base)
    lt.detach(model)
    assert same(bits(model), base)


def test_what_cannot_be_switched_is_refused_and_left_alone():
    model, _ = several()
    lt.adapt(model, lt.LoRA(rank=2), "mlp", name="low")
    lt.switch(model, "a")
    before = bits(model)

    def refused(message: str, *names: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            lt.switch(model, *names, **options)
        assert same(bits(model), before)
        assert lt.active(model) == ("a",)

    refused(r"adapter 'low' \(LoRA\) does not change a few entries of weights.*loratory.use", "low")
    refused("there is no adapter 'd'; the model has: ", "d")
    refused("repeat one", "b", "b")
    refused("mix holds 1 weights for 2 adapters", "b", "c", mix=[1])
    with torch.no_grad():
        next(iter(layers_of(model).values()))["b"].v[0] = float("nan")
    refused("tensor v of its adapter holds NaN or infinity", "b")


def test_layers_that_cannot_be_written_are_refused():
    model = Tiny().eval()
    lt.quantize(model, "int8", "attention")
    lt.adapt(model, lt.SHiRA(), "attention")
    with pytest.raises(
        ValueError, match=r"layer 'blocks.0.attn.q_proj' is quantised, so single entries of it cannot be"
    ):
        lt.switch(model, "default")
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    lt.adapt(tied, lt.SHiRA(), "0")
    with pytest.raises(ValueError, match="layer '0' shares its weight with '1'"):
        lt.switch(tied, "default")
