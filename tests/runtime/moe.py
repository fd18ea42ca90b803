"""Small mixtures of experts of several families."""

from typing import Any

import torch

IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def moe(family: str, experts: str = "eager") -> Any:
    """A tiny random model. `experts`: transformers' implementation of the expert product."""
    import transformers as t

    own: dict[str, Any] = {"num_experts_per_tok": 2}
    if family == "mixtral":
        cls: Any = t.MixtralForCausalLM
        config: Any = t.MixtralConfig(**SMALL, num_local_experts=4, **own)
    elif family == "qwen3":
        cls = t.Qwen3MoeForCausalLM
        config = t.Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=12, decoder_sparse_step=1, **own)
    elif family == "qwen2":
        cls = t.Qwen2MoeForCausalLM
        config = t.Qwen2MoeConfig(
            **SMALL,
            num_experts=4,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=12,
            decoder_sparse_step=1,
            **own,
        )
    elif family == "gpt-oss":
        cls = t.GptOssForCausalLM
        config = t.GptOssConfig(
            **SMALL, num_local_experts=4, layer_types=["full_attention", "sliding_attention"], **own
        )
    else:
        cls = t.Llama4ForCausalLM
        config = t.Llama4TextConfig(
            **SMALL, num_local_experts=4, intermediate_size_mlp=24, interleave_moe_layer_step=1, num_experts_per_tok=1
        )
    torch.manual_seed(1)
    config._experts_implementation = experts
    model = cls(config).eval()
    with torch.no_grad():  # large enough for the adapters to be seen in the logits
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.2 + (1.0 if "norm" in name else 0.0))
    model.set_experts_implementation(experts) if hasattr(model, "set_experts_implementation") else None
    return model
