"""Quantised layers of every kind under LoRA and DoRA: exact where exactness is promised, measured where it is not."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import loratory as lt
from loratory.ops import ggml
from loratory.runtime.layer import layers_of
from loratory.sites import find_site
from loratory.sites.packed import PackedEmbedding, PackedLinear
from loratory.sites.quantized import Quantized
from tests.sites.quantised_bases import METHODS, WHERE, WRITABLE, Net, inputs, move

Make = Callable[[], nn.Module]
EVERY = pytest.mark.parametrize("make", WRITABLE.values(), ids=WRITABLE)
EACH_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
ROUGH = 0.03  # bitsandbytes' int8 layers quantise their input as well


def exact(model: nn.Module) -> float:
    """How far outputs that should be equal may lie apart."""
    return ROUGH if type(find_site("first", model.first)).__name__ == "Bnb8Site" else 1e-5


def stored(model: nn.Module) -> list[torch.Tensor]:
    sites: list[Any] = [find_site(name, model.get_submodule(name)) for name in WHERE]
    return [t.clone() for site in sites for t in site.pieces()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@EVERY
def test_the_site_shows_the_matrix(make: Make):
    model = make()
    plain = Net()
    for name in WHERE:
        site = find_site(name, model.get_submodule(name))
        assert isinstance(site, Quantized)
        W = site.read()
        assert site.shape == tuple(W.shape) == tuple(plain.get_submodule(name).weight.shape)
        assert (site.kind, site.rounds, W.dtype, site.dtype) == ("linear", True, torch.float32, torch.float32)
        error = (W - plain.get_submodule(name).weight).norm() / plain.get_submodule(name).weight.norm()
        assert 0 < error < 0.2
        assert site.stored_bytes < W.numel() * 4 * 0.55 or "Unpacked" in site.packing
        x = torch.randn(4, site.inputs)
        y = site.module(x) if site.bias is None else site.module(x) - site.bias
        torch.testing.assert_close(site.product(x), y, atol=exact(model), rtol=exact(model))


@EVERY
def test_snapshots_are_bits_and_writing_rounds(make: Make):
    model = make()
    site: Any = find_site("first", model.first)
    before, bits, W = stored(model), site.snapshot(), site.read()
    target = W + 0.01 * torch.randn_like(W)
    site.write(target)
    assert not same(stored(model), before)
    assert (site.read() - target).norm() / target.norm() < 0.2
    torch.testing.assert_close(site.read_snapshot(bits), W, atol=0, rtol=0)
    site.restore(bits)
    assert same(stored(model), before)


@EACH_METHOD
@EVERY
def test_adapted_trained_merged_and_detached(make: Make, method: lt.Method):
    model, x = make(), inputs()
    bits = stored(model)
    with torch.no_grad():
        base = model(x)
    lt.adapt(model, method, WHERE)
    with torch.no_grad():
        torch.testing.assert_close(model(x), base, atol=exact(model), rtol=exact(model))
    model.train()
    optimizer = torch.optim.Adam(lt.param_groups(model, lr=1e-2))
    lt.drive(model, optimizer, steps=8)
    losses = []
    for _ in range(8):
        loss = F.mse_loss(model(x), torch.ones(3, 7, 5))
        loss.backward()
        assert all(p.grad is not None for p in lt.trained(model).values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    assert same(stored(model), bits)
    with torch.no_grad():
        adapted = model(x)
        check = lt.merge(model, probe=x, tolerance=1)
        merged = model(x)
    assert check.tolerance == 1
    assert check.relative < 0.25
    torch.testing.assert_close(check.maximum, float((merged - adapted).double().abs().max()), atol=1e-6, rtol=1e-3)
    lt.unmerge(model)
    assert same(stored(model), bits)
    lt.merge(model, probe=x, tolerance=1)
    lt.detach(model)
    assert same(stored(model), bits)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@EVERY
def test_gradients_are_those_of_the_read_weight(make: Make, kind: str):
    model, x = make(), inputs().requires_grad_()
    plain = Net().eval()
    for name in WHERE:
        plain.get_submodule(name).weight.data = find_site(name, model.get_submodule(name)).read()
    found: list[tuple[torch.Tensor, ...]] = []
    for each in (model, plain):
        lt.adapt(each, METHODS[kind], WHERE, seed=0)
        move(each)
        each.train()
        found.append(torch.autograd.grad(each(x).square().sum(), [x, *lt.trained(each).values()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=1e-3)


@EACH_METHOD
@EVERY
def test_no_unpacked_weight_is_kept_for_backward(make: Make, method: lt.Method):
    model = make()
    lt.adapt(model, method, WHERE)
    model.train()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = model(inputs()).sum()
    weights = {tuple(layer.site.shape) for layer in layers_of(model).values()}
    assert not [t for t in kept if t.is_floating_point() and {tuple(t.shape), tuple(t.shape)[::-1]} & weights]
    loss.backward()


@pytest.mark.parametrize(("kind", "reads"), [("lora", 1), ("lora dropout", 1), ("dora", 2), ("dora dropout", 3)])
def test_how_often_a_forward_unpacks(monkeypatch: pytest.MonkeyPatch, kind: str, reads: int):
    """LoRA: for the base product. DoRA: for the row lengths too, and for the product of the dropped input."""
    model = WRITABLE["nf4"]()
    counts: list[str] = []
    read = PackedLinear.read
    monkeypatch.setattr(PackedLinear, "read", lambda self, rows: counts.append("") or read(self, rows))
    lt.adapt(model, METHODS[kind], WHERE)
    assert len(counts) == (0 if "lora" in kind else 2)
    counts.clear()
    model.train()
    loss = model(inputs()).sum()
    assert len(counts) == 2 * reads
    counts.clear()
    loss.backward()
    needed = 2 if kind == "dora dropout" else 1  # each product of the input gives it a gradient
    assert len(counts) <= 2 * needed


def test_merging_above_the_limit_is_refused_with_the_figure_and_undone():
    model, x = WRITABLE["nf4"](), inputs()
    lt.adapt(model, lt.LoRA(rank=3), WHERE)
    move(model)
    bits, adapted = stored(model), model(x)
    with pytest.raises(
        RuntimeError, match=r"\(nf4\): maximum error .* \(allowed 0.02\); the merge was undone.*dequantize=True"
    ):
        lt.merge(model, probe=x)
    assert same(stored(model), bits)
    assert torch.equal(model(x), adapted)
    model = WRITABLE["F16"]()
    lt.adapt(model, lt.LoRA(rank=3), WHERE)
    move(model)
    assert lt.merge(model, probe=x).relative < 2e-2


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
def test_formats_that_cannot_be_written_train_but_refuse_a_merge(name: str):
    form = ggml.FORMATS[name]
    blocks = torch.randint(0, 256, (8, form.bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    at = slice(-2, None) if name == "Q6_K" else slice(0, 4)
    blocks[:, at] = torch.full((8, form.bytes), 1e-3, dtype=torch.float16).view(torch.uint8)[
        :, : blocks[:, at].shape[1]
    ]
    model = nn.Sequential(PackedLinear(name, {"blocks": blocks}, 256, None, torch.float32))
    lt.adapt(model, lt.LoRA(rank=2), "0")
    move(model)
    x = torch.randn(4, 256)
    model(x).sum().backward()
    before = model(x)
    with pytest.raises(
        TypeError, match=rf"stored as {name} cannot be written.*writable are nf4, int8.*dequantize=True"
    ):
        lt.merge(model, probe=x)
    assert torch.equal(model(x), before)
    assert torch.equal(model[0].blocks, blocks)


@pytest.mark.parametrize("packing", ["nf4", "int8", "Q4_1"])
def test_moves_keep_the_weight_and_follow_the_dtype(packing: str):
    model = WRITABLE[packing]()
    bits, W = stored(model), model.first.weight
    model.to(torch.bfloat16)
    assert same(stored(model), bits)
    assert model.first.dtype == model.first.weight.dtype == model.first.bias.dtype == torch.bfloat16
    assert torch.equal(model.first.weight, W.to(torch.bfloat16))
    lt.adapt(model, lt.DoRA(rank=2), WHERE)
    y = model(inputs().bfloat16())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    twin = copy.deepcopy(model)
    move(twin)
    assert not torch.equal(twin(inputs().bfloat16()), model(inputs().bfloat16()))
    assert lt.trained(model)["layers/first/A"].dtype == torch.float32


@EVERY
def test_saved_and_loaded_onto_the_same_quantised_base(make: Make, tmp_path: Path):
    model, x = make(), inputs()
    lt.adapt(model, lt.DoRA(rank=2), WHERE)
    move(model)
    lt.save(model, tmp_path)
    again = make()
    lt.load(again, tmp_path)
    assert torch.equal(again(x), model(x))
    assert lt.summary(model).total == sum(p.numel() for p in Net().parameters())
    other = Net()
    with pytest.raises(
        ValueError,
        match=r"layer 'first.weight' holds other numbers .* was quantised there and is not here.*other_precision",
    ):
        lt.load(other, tmp_path)
    lt.load(other, tmp_path, other_precision=True)
    different = make()
    different.last.weight.data += 0.5
    with pytest.raises(ValueError, match=r"layer 'last.weight' holds other numbers"):
        lt.load(different, tmp_path, other_precision=True)


def test_full_training_of_a_quantised_layer_is_refused():
    for method, options in ((lt.Full(), {}), (lt.LoRA(), {"where": "first", "also_train": ["second"]})):
        with pytest.raises(ValueError, match=r"layer '\w+' is quantised, so it cannot be trained in full; adapt it"):
            lt.adapt(WRITABLE["nf4"](), method, **options)


def test_a_packed_embedding_reads_only_the_rows_it_needs_and_can_be_adapted(monkeypatch: pytest.MonkeyPatch):
    table = torch.randn(50, 32)
    model: Any = nn.Sequential(PackedEmbedding("Q8_0", {"blocks": ggml.pack("Q8_0", table)}, 32, 3, torch.float32))
    rows: list[Any] = []
    read = PackedEmbedding.read
    monkeypatch.setattr(PackedEmbedding, "read", lambda self, at: rows.append(at) or read(self, at))
    ids = torch.tensor([[1, 3], [49, 1]])
    base = model(ids)
    torch.testing.assert_close(base, table[ids], atol=0.03, rtol=0)
    lt.adapt(model, lt.LoRA(rank=2), "0")
    assert torch.equal(model(ids), base)
    move(model)
    adapted = model(ids)
    assert not torch.equal(adapted, base)
    assert all(at.numel() == 4 for at in rows)
    check = lt.merge(model, probe=ids)
    assert 0 < check.relative < 2e-2
    lt.detach(model)
    assert torch.equal(model(ids), base)


def test_one_compiled_graph_that_keeps_no_weight(compiling: None):
    model, x = WRITABLE["nf4"](), inputs()
    lt.adapt(model, lt.LoRA(rank=2), WHERE)
    move(model)
    expected = torch.autograd.grad(model(x).sum(), list(lt.trained(model).values()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).sum(), list(lt.trained(model).values()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
