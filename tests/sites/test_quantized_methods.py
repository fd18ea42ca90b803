"""Every method for linear layers on layers that loratory.quantize has packed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import loratory as lt
from loratory.runtime.layer import layers_of
from loratory.sites import find_site
from tests.laws.kinds import KINDS, Case, adapters_of, move, square
from tests.laws.table import TABLE
from tests.laws.test_laws import close
from tests.sites.quantised_bases import LINEAR_CASES, WHERE
from tests.sites.test_quantized import same, stored

each_method = pytest.mark.parametrize("case", LINEAR_CASES.values(), ids=LINEAR_CASES)
each_packing = pytest.mark.parametrize("packing", ["nf4", "int8"])


def quantised(case: Case, packing: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = case.plain(dtype)
    lt.quantize(model, packing, WHERE)
    return model


def read(model: nn.Module) -> list[Tensor]:
    return [find_site(name, model.get_submodule(name)).read().detach() for name in WHERE]


def attach(case: Case, model: nn.Module) -> nn.Module:
    """With what the method needs to have seen collected before the weights were packed."""
    seen = None
    if case.method.needs:
        base = case.plain(torch.float64)
        seen = lt.collect(base, [case.inputs(torch.float64)], square, case.method.needs, where=WHERE)
    lt.adapt(model, case.method, WHERE, seen=seen, seed=0)
    return model


@each_packing
@each_method
def test_function_is_unchanged_at_the_start(case: Case, packing: str):
    x, start = case.inputs(), case.row.start
    base = quantised(case, packing)
    assert not close(base(x), case.plain()(x), 1e-4)
    model = attach(case, quantised(case, packing))
    assert close(model(x), base(x), start(case.method) if callable(start) else start)


@each_packing
@each_method
def test_it_is_the_method_on_the_unpacked_weight(case: Case, packing: str):
    """Tensors at the start, outputs and all gradients."""
    model, plain = quantised(case, packing, torch.float64), case.plain(torch.float64)
    for name, W in zip(WHERE, read(model), strict=True):
        plain.get_submodule(name).weight.data = W
    tensors, outputs, slopes = [], [], []
    for each in (model, plain):
        attach(case, each)
        tensors.append([t.clone() for adapter in adapters_of(each).values() for t in adapter.every_tensor().values()])
        move(each, far=case.row.far)
        each.train()
        x = case.inputs(torch.float64).requires_grad_()
        torch.manual_seed(4)
        outputs.append(each(x))
        slopes.append(torch.autograd.grad(square(each, x), [x, *lt.trained(each).values()]))
    assert same(*tensors)
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


@each_packing
@each_method
def test_training_leaves_the_codes(case: Case, packing: str):
    x, model = case.inputs(), attach(case, quantised(case, packing))
    before, start = stored(model), {n: p.detach().clone() for n, p in lt.trained(model).items()}
    model.train()
    optimizer = torch.optim.Adam(lt.param_groups(model, lr=1e-2))
    lt.drive(model, optimizer, steps=3, epoch_steps=3)
    for _ in range(3):
        square(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert not all(torch.equal(p, start[n]) for n, p in lt.trained(model).items())
    assert same(stored(model), before)
    lt.detach(model)
    assert torch.equal(model(x), quantised(case, packing)(x))


@each_packing
@pytest.mark.parametrize("label", [label for label, case in LINEAR_CASES.items() if case.method.mergeable])
def test_merging_rounds_the_adapted_weight_and_comes_back(label: str, packing: str):
    case = LINEAR_CASES[label]
    model = attach(case, quantised(case, packing))
    move(model, far=case.row.far)
    before = stored(model)
    adapted = [t.method.weight(t, W) for t, W in zip(adapters_of(model).values(), read(model), strict=True)]
    lt.merge(model, probe=case.inputs(), tolerance=1)
    for W, expected in zip(read(model), adapted, strict=True):
        assert (W - expected).norm() < (0.15 if packing == "nf4" else 0.01) * expected.norm()
    assert not same(stored(model), before)
    lt.unmerge(model)
    assert same(stored(model), before)


@each_method
def test_saved_and_loaded_onto_the_same_codes(case: Case, tmp_path: Path):
    x, model = case.inputs(), attach(case, quantised(case, "nf4"))
    move(model, far=case.row.far)
    lt.save(model, tmp_path)
    again = quantised(case, "nf4")
    lt.load(again, tmp_path)
    assert torch.equal(again(x), model(x))


@each_method
def test_no_unpacked_weight_is_kept_for_backward(case: Case):
    model = attach(case, quantised(case, "nf4")).train()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        square(model, case.inputs())
    for W in read(model):
        found = [t.T if t.shape == W.T.shape else t for t in kept if t.shape in (W.shape, W.T.shape)]
        whole = [t for t in found if (t - W).norm() < 0.5 * W.norm()]
        assert not whole or case.method.cache_delta


@each_packing
@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if "Linear" not in row.served])
def test_methods_for_other_layers_refuse(name: str, packing: str):
    case = Case(KINDS["Linear"], next(iter(TABLE[name].made(2).values())), TABLE[name])
    model = quantised(case, packing)
    before = repr(model)
    with pytest.raises(ValueError, match=f"layer 'first.*{case.row.refusal}.*exclude="):
        attach(case, model)
    assert repr(model) == before


@each_packing
@pytest.mark.parametrize("label", [label for label, case in LINEAR_CASES.items() if case.method.needs])
def test_gradients_are_collected_before_the_weights_are_packed(label: str, packing: str):
    case = LINEAR_CASES[label]
    model = quantised(case, packing)
    with pytest.raises(ValueError, match=r"layer 'first' is quantised, and a method that starts from gradients"):
        lt.collect(model, [case.inputs()], square, case.method.needs, where=WHERE)
    with pytest.raises(ValueError, match=r"layer 'first': \w+ needs training batches for its start"):
        lt.adapt(model, case.method, WHERE)
    assert not layers_of(model)
