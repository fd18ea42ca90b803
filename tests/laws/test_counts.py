"""Stated parameter counts at the papers' real shapes, on the meta device."""

import pytest
import torch
from torch import nn

import loratory as lt


def llama_2_7b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=32))  # LlamaConfig's other defaults are Llama-2-7B


def roberta_base() -> nn.Module:
    from transformers import RobertaConfig, RobertaModel

    with torch.device("meta"):
        return RobertaModel(RobertaConfig())  # the defaults are RoBERTa-base


def mixtral_8x7b() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    with torch.device("meta"):
        return MixtralForCausalLM(MixtralConfig())  # the defaults are Mixtral-8x7B


def gpt_2_medium() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))


def gpt_3() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*[nn.ModuleDict({p: nn.Linear(12288, 12288) for p in "qkvo"}) for _ in range(96)])


@pytest.mark.parametrize(
    ("model", "method", "where", "numbers"),
    [
        (llama_2_7b, lt.LoRA(rank=1), "all-linear", 2_498_560),
        (llama_2_7b, lt.LoRA(rank=16), "all-linear", 16 * 2_498_560),
        (llama_2_7b, lt.LoRA(rank=1), "q_proj, v_proj", 524_288),
        (llama_2_7b, lt.DoRA(rank=1), "q_proj, v_proj", 524_288 + 2 * 32 * 4096),
        (roberta_base, lt.LoRA(rank=8, alpha=8), "query, value", 294_912),
        (mixtral_8x7b, lt.LoRA(rank=1), "experts", 32 * 8 * ((4096 + 28672) + (14336 + 4096))),
        (mixtral_8x7b, lt.DoRA(rank=1), "experts", 32 * 8 * ((4096 + 28672) + (14336 + 4096) + 28672 + 4096)),
        (gpt_3, lt.LoRA(rank=1), "q, v", 4_718_592),
        (gpt_2_medium, lt.MergedLoRA(rank=4, alpha=32), "c_attn", 393_216),
    ],
)
def test_papers_figures(model, method, where, numbers):
    model = model()
    lt.adapt(model, method, where)
    summary = lt.summary(model)
    assert summary.trained == numbers == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert summary.bytes == 4 * numbers
