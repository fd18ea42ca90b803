"""Tiny GGUF files, written with the package gguf in llama.cpp's order of rows."""

from pathlib import Path
from typing import Any

import numpy as np
import torch


def tiny_model(architecture: str = "llama", *, tied: bool = True) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[architecture]
    torch.manual_seed(0)
    head_dim = 128 if architecture == "qwen3" else 16  # what transformers' reader takes for granted
    config = config_class(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=head_dim, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = model_class(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(0.1 * torch.randn(p.shape))
    return model


def write_gguf(file: Path, model: Any, architecture: str, packing: str, *, extra: str | None = None) -> Path:
    import gguf

    config, kind = model.config, gguf.GGMLQuantizationType[packing]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    known = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    for name, p in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        W = p.detach().numpy()
        if architecture == "llama" and owner.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if owner.endswith("q_proj") else config.num_key_value_heads
            W = W.reshape(heads, 2, -1, *W.shape[1:]).swapaxes(1, 2).reshape(W.shape)
        key = f"{names.get_name(owner)}.{leaf}"
        if W.ndim == 1 or packing == "F32":
            writer.add_tensor(key, W)
        elif packing == "F16":
            writer.add_tensor(key, W.astype(np.float16))
        else:
            writer.add_tensor(key, gguf.quants.quantize(W, kind), raw_dtype=kind)
    if extra is not None:
        writer.add_tensor(extra, np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
