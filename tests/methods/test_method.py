"""The ladder: what follows from the rung a method states."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.catalogue.properties import kept_storages
from loratory.methods import frozen, trained
from loratory.methods.method import two_factors


@dataclass(frozen=True, kw_only=True)
class Core(lt.Method):
    """Core: B core A with frozen B and A."""

    vector: bool = True

    def init(self, site):
        core = torch.zeros(*site.stack, 2) if self.vector else torch.zeros(*site.stack, 2, 2)
        B, A = torch.randn(*site.stack, site.outputs, 2), torch.randn(*site.stack, 2, site.inputs)
        return {"B": frozen(B), "core": trained(core), "A": frozen(A)}

    def factors(self, t):
        return t.B, t.core, t.A


@dataclass(frozen=True, kw_only=True)
class Shift(lt.Method):
    """Shift: any update (rung 2)."""

    def init(self, site):
        return {"D": trained(torch.zeros(site.shape))}

    def delta(self, t):
        return t.D


@dataclass(frozen=True, kw_only=True)
class Turn(lt.Method):
    """Turn: any weight (rung 3)."""

    def init(self, site):
        return {"Q": trained(torch.eye(site.outputs).expand(*site.stack, -1, -1).clone())}

    def weight(self, t, W):
        return t.Q.to(W.dtype) @ W


@dataclass(frozen=True, kw_only=True)
class Gate(lt.Method):
    """Gate: anything (rung 4), not a change of the weight."""

    def init(self, site):
        return {"g": trained(torch.zeros(site.shape[:-1]))}

    def forward(self, t, x, base, site):
        y = base(x)
        return y + torch.tanh(y) * site.along_out(t.g)


RUNGS = {Core(): 1, Core(vector=False): 1, Shift(): 2, Turn(): 3, Gate(): 4}
LAYERS = {"linear": (lambda: nn.Linear(5, 4), (3, 5)), "conv": (lambda: nn.Conv1d(4, 4, 3, groups=2), (3, 4, 6))}


@pytest.mark.parametrize("method", RUNGS, ids=repr)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_rung_runs_mixes_and_merges(method: lt.Method, layer: str):
    make, shape = LAYERS[layer]
    model, x = nn.Sequential(make()), torch.randn(shape)
    base = model(x)
    lt.adapt(model, method, "0")
    assert method.rung == RUNGS[method]
    torch.testing.assert_close(model(x), base)
    with torch.no_grad():
        for p in lt.trained(model).values():
            p += 0.3 * torch.randn_like(p)
    full = model(x)
    assert not torch.allclose(full, base)
    lt.use(model, "default", mix=[0.25])
    torch.testing.assert_close(model(x), base + 0.25 * (full - base))
    if method.mergeable:
        lt.merge(model, probe=x)
        torch.testing.assert_close(model(x), base + 0.25 * (full - base))
    else:
        with pytest.raises(ValueError, match=r"layer '0': Gate changes more than a weight, so it cannot be merged"):
            lt.merge(model, probe=x)


@dataclass(frozen=True, kw_only=True)
class Dropped(Shift):
    """Dropped: any update, of an input with dropout."""

    dropout: float = 0.5
    cache_delta: bool = False


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("mix", [None, [0.25]])
@pytest.mark.parametrize("layer", LAYERS)
def test_an_update_on_rung_2_has_dropout(layer: str, mix: list[float] | None, kept: bool):
    make, shape = LAYERS[layer]
    model, x = nn.Sequential(make()), torch.randn(shape)
    base = model(x)
    lt.adapt(model, Dropped(cache_delta=kept), "0")
    D = model[0].loratory["default"].D
    with torch.no_grad():
        D.normal_()
    change = model.eval()(x) - base
    lt.use(model, "default", mix=mix)
    torch.manual_seed(0)
    y = model.train()(x)
    y.sum().backward()
    torch.manual_seed(0)
    u = nn.functional.dropout(x, 0.5)
    site = model[0].loratory.site
    m = 1 if mix is None else mix[0]
    torch.testing.assert_close(y, base + m * site.apply(u, D))
    torch.testing.assert_close(D.grad, m * site.weight_gradient(torch.ones_like(y), u, None))
    torch.testing.assert_close(model.eval()(x), base + m * change)


def test_two_rungs_mix():
    model, x = nn.Sequential(nn.Linear(5, 4)), torch.randn(3, 5)
    base, changes = model(x), {}
    for method in RUNGS:
        name = type(method).__name__ + str(getattr(method, "vector", ""))
        lt.adapt(model, method, "0", name=name)
        with torch.no_grad():
            for p in lt.trained(model).values():
                p += 0.3 * torch.randn_like(p)
        changes[name] = model(x) - base
    weights = [0.5, -0.3, 0.2, 1.5, 0.7]
    lt.use(model, *changes, mix=weights)
    torch.testing.assert_close(model(x), base + sum(m * c for m, c in zip(weights, changes.values(), strict=True)))


def test_frozen_tensors_are_buffers_and_not_trained():
    model = nn.Sequential(nn.Linear(5, 4))
    lt.adapt(model, Core(), "0")
    assert list(lt.trained(model)) == ["layers/0/core"]
    assert sorted(n for n, _ in model[0].loratory["default"].named_buffers()) == ["A", "B"]


def test_two_factors():
    B, A = torch.randn(4, 2), torch.randn(2, 5)
    diagonal, core = torch.randn(2), torch.randn(2, 2)
    for factors, expected in [
        ((B, A), B @ A),
        ((B, diagonal, A), B @ torch.diag(diagonal) @ A),
        ((B, core, A), B @ core @ A),
        ((B.expand(3, 4, 2), diagonal, A), (B @ torch.diag(diagonal) @ A).expand(3, 4, 5)),
        ((B.expand(3, 4, 2), diagonal.expand(3, 2), A), (B @ torch.diag(diagonal) @ A).expand(3, 4, 5)),
        ((B.expand(3, 4, 2), core.expand(3, 2, 2), A), (B @ core @ A).expand(3, 4, 5)),
    ]:
        left, right = two_factors(factors)
        torch.testing.assert_close(left @ right, expected)


def test_what_a_method_leaves_out_is_said():
    @dataclass(frozen=True, kw_only=True)
    class Empty(lt.Method):
        """Empty: nothing."""

    with pytest.raises(TypeError, match=r"Empty makes no tensors for layer '0': its init is not defined"):
        lt.adapt(nn.Sequential(nn.Linear(2, 2)), Empty(), "0")
    with pytest.raises(TypeError, match="Empty has no low-rank form"):
        Empty().factors(None)
    with pytest.raises(TypeError, match="Empty has no forward of its own"):
        Empty().forward(None, torch.empty(0), lambda x: x, None)


def test_a_tensor_name_that_is_taken_leaves_the_model_untouched():
    @dataclass(frozen=True, kw_only=True)
    class Clash(lt.Method):
        """Clash: a tensor called like a module's own attribute."""

        def init(self, site):
            return {"training": trained(torch.zeros(1))}

        def delta(self, t):
            return t.training

    model = nn.Sequential(nn.Linear(2, 2))
    before = repr(model)
    with pytest.raises(
        ValueError, match=r"Clash names a tensor 'training', a name that is taken; rename it in its init"
    ):
        lt.adapt(model, Clash(), "0")
    assert repr(model) == before
    assert type(model[0]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())
    assert lt.adapters(model) == ()


def test_description_is_the_first_line():
    assert Core.description() == "B core A with frozen B and A."


@pytest.mark.parametrize(
    "method",
    [lt.SVFit(), lt.SALT(rank=2), lt.LoRAXS(rank=2), lt.LaMDA(rank=2), lt.LoLDU(), lt.WaRA(bands="tiny", rank=2)],
    ids=lambda method: type(method).__name__,
)
def test_a_weight_that_has_no_decomposition_is_named(method):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight[3, 2] = float("inf")
    with pytest.raises(ValueError, match=r"layer '1' has a weight with numbers that are not finite.*exclude="):
        lt.adapt(model, method)


@pytest.mark.parametrize(
    ("method", "rank"), [(lt.SVFit(), 768), (lt.LoLDU(), 768), (lt.LoRAXS(), 64), (lt.LoRASB(), 96), (lt.LaMDA(), 32)]
)
def test_the_footprint_counts_the_rank_that_the_layer_gets(method, rank):
    assert method.footprint(2048, 1024).per_token == rank
    if method.core_form != "diagonal":
        assert method.footprint(2048, 1024).kept >= 2048 * rank  # B with its core
    assert method.footprint(40, 20).per_token == 20


@pytest.mark.parametrize(
    ("method", "most"),
    [
        (lt.SVFit(), 4 * 64),
        (lt.LoLDU(), 4 * 64),
        (lt.RandLoRA(rank=4, dropout=0.1), 64 * 64 // 4 - 1),
        (lt.TLoRA(rank=2), 64 * 64 // 4),
    ],
    ids=lambda each: type(each).__name__,
)
def test_nothing_as_large_as_the_weight_is_kept_for_the_backward_pass(method, most):
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    lt.adapt(model, method, "0")
    with torch.no_grad():
        for p in lt.trained(model).values():
            p.normal_(std=0.1)
    kept = kept_storages(lambda: model(torch.randn(4, 64, requires_grad=True)))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages = [t.untyped_storage() for t in kept]
    assert max(s.nbytes() for s in storages if s.data_ptr() not in own) <= 4 * most


@pytest.mark.parametrize("sides", [(64, 128), (128, 64)])
def test_the_footprint_of_wide_factors_counts_what_is_kept_between_them(sides):
    """Where B is the one that follows from trained numbers, A x is kept for its gradient."""
    assert lt.RandLoRA(rank=4).footprint(*sides).per_token == 64
