"""GGUF adapters: a GGUF base as llama.cpp's converter writes it, with our adapter applied as llama.cpp applies it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import loratory as lt
from tests.oracle.pairs import randomised
from tests.runtime.models import tiny_bert, tiny_gpt2

X = torch.arange(5, 25).reshape(2, 10)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(X).logits.double()


def pairs_of_rows(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """q and k as llama.cpp's converter stores them: row i of a head and row i + half side by side."""
    half = weight.shape[0] // heads // 2
    order = [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in (0, 1)]
    return weight[order]


def gguf_weights(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The base's weights under llama.cpp's names, in its order."""
    config, out = model.config, {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.numpy()
        for leaf, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if leaf in key:
                weight = pairs_of_rows(weight, heads)
        out[names.get_name(key.removesuffix(".weight")) + ".weight"] = weight
    return out


def write_base(model: Any, weights: dict[str, np.ndarray[Any, Any]], path: Path) -> None:
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("stories")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(float(c.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    writer.add_vocab_size(c.vocab_size)
    for name, weight in weights.items():
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_adapter(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {t.name: np.array(t.data) for t in reader.tensors}


def applied(weights: dict[str, np.ndarray[Any, Any]], path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """llama.cpp's rule: W + alpha / rank lora_b lora_a, by name; a token embedding's lora_a lies the other way."""
    fields, tensors = read_adapter(path)
    out = dict(weights)
    for key in {k.removesuffix(".lora_a").removesuffix(".lora_b") for k in tensors}:
        a, b = tensors[f"{key}.lora_a"], tensors[f"{key}.lora_b"]
        scale = fields["adapter.lora.alpha"] / b.shape[1]
        delta = a @ b.T if key.startswith("token_embd") else b @ a
        assert delta.shape == out[key].shape
        out[key] = out[key] + np.float32(scale) * delta
    return out


@pytest.mark.parametrize(
    ("method", "options", "export"),
    [
        (lt.LoRA(rank=4, alpha=6), {"where": "all-linear"}, {}),
        (lt.LoRA(rank=4, alpha=6, rslora=True), {"where": "q_proj, k_proj", "per_layer": {"q_proj": {"rank": 2, "alpha": 1}}}, {}),
        (lt.LoRA(rank=2), {"where": "embed_tokens, v_proj"}, {}),
        (lt.DoRA(rank=4), {"where": "attention"}, {"rank": 64}),
        (lt.MergedLoRA(groups=(True, False), rank=2), {"where": "k_proj"}, {}),
    ],
    ids=["every linear layer", "ranks and scales by layer", "embedding", "DoRA", "MergedLoRA"],
)  # fmt: skip
def test_base_and_adapter_give_the_merged_models_logits(
    method: lt.Method, options: Any, export: Any, stories: Callable[[], Any], tmp_path: Path
):
    base = stories()
    weights = gguf_weights(base)
    write_base(base, weights, tmp_path / "base.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="base.gguf")
    assert float((logits(read) - logits(base)).abs().max()) < 1e-5  # the order of rows is llama.cpp's
    model = stories()
    lt.adapt(model, method, **options)
    randomised(model)
    lt.export(model, tmp_path / "adapter", to="gguf", **export)
    write_base(base, applied(weights, tmp_path / "adapter" / "adapter.gguf"), tmp_path / "both.gguf")
    both = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="both.gguf")
    if options["where"].startswith("embed"):  # llama.cpp's head reads the same stored weight, ours is the base's
        wanted, found = model.model.embed_tokens(X), both.model.embed_tokens(X)
    else:
        lt.merge(model)
        wanted, found = logits(model), logits(both)
        assert float((wanted - logits(base)).abs().max()) > 0.1
    span = float((wanted.max() - wanted.min()).detach())
    assert float((found - wanted).abs().max().detach()) < 1e-5 * span


def test_what_the_file_says(stories: Callable[[], Any], tmp_path: Path):
    model = stories()
    lt.adapt(model, lt.LoRA(rank=4, alpha=6), "q_proj", blocks=0, name="tales")
    randomised(model)
    record = lt.export(model, tmp_path / "a", to="gguf")
    assert "relative error 0 in total" in str(record)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["adapter.gguf"]
    fields, tensors = read_adapter(tmp_path / "a" / "adapter.gguf")
    assert {k: fields[k] for k in ("general.architecture", "general.type", "general.name", "adapter.type")} == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "tales",
        "adapter.type": "lora",
    }
    assert fields["adapter.lora.alpha"] == 4.0
    assert {k: v.shape for k, v in tensors.items()} == {
        "blk.0.attn_q.weight.lora_a": (4, 64),
        "blk.0.attn_q.weight.lora_b": (64, 4),
    }
    heads = model.config.num_attention_heads
    wanted = pairs_of_rows(1.5 * lt.trained(model)["layers/model.layers.0.self_attn.q_proj/B"].detach().numpy(), heads)
    np.testing.assert_allclose(tensors["blk.0.attn_q.weight.lora_b"], wanted, rtol=1e-6)


def test_a_family_without_rotated_heads(tmp_path: Path):
    """GPT-2's transposed layers lie as (out, in), and no rows change places."""
    model = tiny_gpt2()
    lt.adapt(model, lt.LoRA(rank=2, alpha=4), "c_attn, c_fc")
    randomised(model)
    lt.export(model, tmp_path / "a", to="gguf")
    fields, tensors = read_adapter(tmp_path / "a" / "adapter.gguf")
    assert fields["general.architecture"] == "gpt2"
    own = lt.trained(model)
    assert set(tensors) == {
        f"blk.{i}.{n}.weight.lora_{x}" for i in (0, 1) for n in ("attn_qkv", "ffn_up") for x in "ab"
    }
    np.testing.assert_allclose(
        tensors["blk.1.attn_qkv.weight.lora_a"], own["layers/transformer.h.1.attn.c_attn/A"].detach()
    )
    np.testing.assert_allclose(
        tensors["blk.1.attn_qkv.weight.lora_b"], 2 * own["layers/transformer.h.1.attn.c_attn/B"].detach()
    )


@pytest.mark.parametrize(
    ("method", "options", "export", "message"),
    [
        (lt.DoRA(rank=2), {"where": "q_proj"}, {}, r"layer 'model.layers.0.self_attn.q_proj': DoRA has no low-rank form of its own; say which rank"),
        (lt.DoRA(rank=2), {"where": "q_proj"}, {"rank": 1}, r"above limit=0.05, so nothing was written"),
        (lt.LoRA(rank=2), {"where": "q_proj", "also_train": "norm"}, {}, r"adapter 'default' also trains 'model\..*norm.weight' in full"),
        (lt.LoRA(rank=2), {"where": "lm_head"}, {}, r"layer 'lm_head' shares its weight with 'model.embed_tokens.weight', so a GGUF base holds it once"),
    ],
)  # fmt: skip
def test_refusals(
    method: lt.Method, options: Any, export: Any, message: str, stories: Callable[[], Any], tmp_path: Path
):
    model = stories()
    lt.adapt(model, method, **options)
    randomised(model)
    with pytest.raises(ValueError, match=message):
        lt.export(model, tmp_path / "a", to="gguf", **export)
    assert list(tmp_path.iterdir()) == []


def test_other_models_are_refused(tmp_path: Path):
    model = tiny_bert()
    lt.adapt(model, lt.LoRA(rank=2), "query")
    with pytest.raises(
        ValueError, match=r"a BertForSequenceClassification \(model_type 'bert'\) cannot be written as a GGUF"
    ):
        lt.export(model, tmp_path / "a", to="gguf")
    model = tiny_gpt2()
    lt.adapt(model, lt.LoRA(rank=2), "c_attn, wpe")
    lt.trained(model)["layers/transformer.wpe/A"].data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"layer 'transformer.wpe': tensor A of its adapter holds NaN or infinity"):
        lt.export(model, tmp_path / "a", to="gguf")
    assert list(tmp_path.iterdir()) == []
