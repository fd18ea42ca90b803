"""lt.quantize: what it replaces, what it refuses, and how adapter files know of it."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.runtime.state import transforms_of
from loratory.sites.packed import PackedLinear
from tests.runtime.models import IDS, Tiny, tiny_bert, tiny_gpt2


@pytest.mark.parametrize(("packing", "bits"), [("nf4", 4.13), ("int8", 8.25)])
def test_linear_layers_become_packed_and_the_head_stays(stories: Any, packing: str, bits: float):
    model, plain = stories(), stories()
    numbers = sum(p.numel() for p in plain.parameters())
    ids = torch.arange(1, 33).view(2, 16)
    with torch.no_grad():
        expected = plain(ids).logits
    assert lt.quantize(model, packing) is None
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(packed) == 35
    assert not any("lm_head" in name for name in packed)
    stored = sum(t.numel() * t.element_size() for m in packed.values() for t in m.stored().values())
    total = sum(m.in_features * m.out_features for m in packed.values())
    assert 8 * stored / total < bits + 0.25  # rows of 172 end in a short block
    with torch.no_grad():
        error = (model(ids).logits - expected).abs().max() / (expected.max() - expected.min())
    assert 0 < error < {"nf4": 0.2, "int8": 0.02}[packing]
    lt.adapt(model, lt.LoRA(rank=2))
    assert lt.summary(model).total == numbers
    assert transforms_of(model) == [f"quantize {packing} (35 layers)"]


def test_where_exclude_and_bias():
    model = tiny_bert()
    bias = model.bert.encoder.layer[0].output.dense.bias
    lt.quantize(model, "int8", where="mlp", blocks=0)
    packed = [name for name, m in model.named_modules() if isinstance(m, PackedLinear)]
    assert packed == ["bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"]
    assert model.bert.encoder.layer[0].output.dense.bias is bias
    lt.quantize(model, "nf4", where="query,key", exclude="key")
    assert transforms_of(model) == ["quantize int8 (2 layers)", "quantize nf4 (2 layers)"]


def test_each_full_weight_is_dropped_before_the_next(monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    alive = [weakref.ref(layer.weight) for layer in model]
    counts: list[int] = []
    pack = torch.bucketize

    def count(*args: Any, **kwargs: Any) -> Any:
        counts.append(sum(ref() is not None for ref in alive))
        return pack(*args, **kwargs)

    monkeypatch.setattr(torch, "bucketize", count)
    lt.quantize(model, "nf4", lambda name, m: isinstance(m, nn.Linear))
    assert counts == [8, 7, 6, 5, 4, 3, 2, 1]


def refusal(model: nn.Module, error: type[Exception], match: str, *args: Any, **options: Any) -> None:
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(error, match=match):
        lt.quantize(model, *args, **options)
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert transforms_of(model) == []


def test_refusals_change_nothing():
    refusal(Tiny(), ValueError, "packing is 'int4'; it must be one of nf4, int8", "int4")
    refusal(
        tiny_gpt2(), TypeError, "layer 'transformer.h.0.attn.c_attn' is a Conv1D; only torch.nn.Linear can be quantised"
    )
    refusal(Tiny(), TypeError, "layer 'embed' is a Embedding; only", where="embed,q_proj")
    model = Tiny()
    model.head.weight = model.embed.weight
    refusal(model, ValueError, "layer 'head' shares its weight with 'embed.weight', so quantising it would part them")
    model = Tiny()
    model.blocks[1].up_proj.weight.data[0, 0] = torch.nan
    refusal(model, ValueError, "layer 'blocks.1.up_proj' holds NaN or infinity")
    model = Tiny()
    model.head.register_forward_hook(lambda *a: None)
    refusal(model, TypeError, "layer 'head' .Linear. has a forward or hooks of its own")
    with torch.device("meta"):
        model = Tiny()
    refusal(model, ValueError, r"layer 'blocks.0.attn.q_proj' has no data \(meta device\)")
    model = Tiny()
    lt.adapt(model, lt.LoRA(rank=2))
    with pytest.raises(RuntimeError, match=r"has adapters already; quantise the base first"):
        lt.quantize(model)
    model = Tiny()
    lt.quantize(model, where="head")
    with pytest.raises(TypeError, match=r"layer 'head' \(PackedLinear\) is quantised already"):
        lt.quantize(model)


def test_adapter_files_know_the_transform(tmp_path: Path):
    model = Tiny()
    lt.quantize(model, "nf4", exclude="head")
    lt.adapt(model, lt.LoRA(rank=2))
    lt.save(model, tmp_path)
    base = lt.inspect(tmp_path).base
    assert base["transforms"] == ["quantize nf4 (12 layers)"]
    assert "blocks.0.attn.q_proj.weight" in base["quantized"]
    assert base["shapes"]["blocks.0.up_proj.weight"] == [16, 8]
    again = Tiny()
    lt.quantize(again, "nf4", exclude="head")
    lt.load(again, tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    for packing in (None, "int8"):
        other = Tiny()
        if packing:
            lt.quantize(other, packing, exclude="head")
        with pytest.raises(
            ValueError,
            match=r"transformed by quantize nf4 \(12 layers\), this one by .*apply the same transforms first, or pass other_precision",
        ):
            lt.load(other, tmp_path)
        lt.load(other, tmp_path, other_precision=True)
    lt.detach(again)
    assert transforms_of(again) == ["quantize nf4 (12 layers)"]
    lt.adapt(again, lt.LoRA(rank=2))


def test_state_dicts_go_from_one_quantised_model_to_another():
    model, other = Tiny(), Tiny()
    other.head.weight.data.zero_()
    for each in (model, other):
        lt.quantize(each, "nf4")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS), model(IDS))
