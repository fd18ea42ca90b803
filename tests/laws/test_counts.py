"""Stated parameter counts at the papers' real shapes, on the meta device."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.catalogue.counts import times_fewer_updates
from loratory.runtime.layer import layers_of


def llama_2_7b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=32))  # LlamaConfig's other defaults are Llama-2-7B


def llama_2_13b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes))


def llama_3_8b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes))


def llama_2_70b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=8))


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


def gpt_2_medium_apart() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*[nn.ModuleDict({p: nn.Linear(1024, 1024) for p in "qkvo"}) for _ in range(24)])


def mistral_7b() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    with torch.device("meta"):
        return MistralForCausalLM(MistralConfig(num_key_value_heads=8))  # the other defaults are Mistral-7B


def gemma_2_9b() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16}
    with torch.device("meta"):
        return Gemma2ForCausalLM(Gemma2Config(**sizes, num_key_value_heads=8, head_dim=256))


def llama_3_2_3b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=8, head_dim=128, vocab_size=128256))


def vit(width: int, layers: int, heads: int) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        from transformers import ViTConfig, ViTModel

        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        with torch.device("meta"):
            return ViTModel(ViTConfig(**sizes, num_attention_heads=heads))

    return model


def vit_b_16() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    with torch.device("meta"):
        return ViTForImageClassification(ViTConfig())  # the defaults are ViT-B/16


def sam_vit_b() -> nn.Module:
    from transformers import SamVisionConfig, SamVisionModel

    with torch.device("meta"):
        return SamVisionModel(SamVisionConfig())  # the defaults are ViT-B, with q, k and v in one weight


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
        (mistral_7b, lt.LoRAXS(rank=64), "all-linear", 917_504),
        (mistral_7b, lt.LoRAXS(rank=96), "all-linear", 2_064_384),
        (gemma_2_9b, lt.LoRAXS(rank=96), "all-linear", 2_709_504),
        (gemma_2_9b, lt.LoRA(rank=32), "all-linear", 108_036_096),
        (llama_3_2_3b, lt.LoRAXS(rank=96), "all-linear", 1_806_336),
        (llama_3_2_3b, lt.LoRA(rank=32), "all-linear", 48_627_712),
        (llama_2_7b, lt.MoS(rank=8, budget=2), "all-linear", 4_997_120),
        (llama_2_7b, lt.MoS(rank=32, budget=8, shards=4), "all-linear", 19_988_480),
        (llama_2_7b, lt.LoRA(rank=64), "all-linear", 159_907_840),
        (llama_2_13b, lt.MoS(rank=8, budget=2), "all-linear", 7_823_360),
        (llama_3_8b, lt.RandLoRA(rank=30), "q_proj, k_proj, v_proj, up_proj, down_proj", 56_626_112),
        (llama_3_8b, lt.LoRA(rank=32), "q_proj, k_proj, v_proj, up_proj, down_proj", 56_623_104),
        (llama_2_7b, lt.SHiRA(rank=32), "q_proj, k_proj, v_proj, up_proj, down_proj", 56_098_816),
        (llama_2_7b, lt.LaMDA(rank=32), "all-linear", 43_745_280),
        (llama_2_7b, lt.LoRA(rank=32), "all-linear", 79_953_920),
        (llama_2_7b, lt.WaRA(rank=1), "all-linear", 2 * 2_498_560),
        (vit(768, 12, 12), lt.SNELLA(rank=32), "layers[.].*", 5_308_632),
        (vit(1024, 24, 16), lt.SNELLA(rank=32), "layers[.].*", 14_156_208),
        (vit(1280, 32, 16), lt.SNELLA(rank=32), "layers[.].*", 23_593_536),
        (vit(768, 12, 12), lt.SNELLA(rank=32, kernel="distance"), "layers[.].*", 5_308_416),
        (vit(768, 12, 12), lt.LoRA(rank=32), "layers[.].*", 5_308_416),
        (llama_2_7b, lt.WaRA(bands="tokens", rank=1, grid=(8, 8)), "all-linear", 2_498_560 + 4 * 7 * 32),
        (llama_2_70b, lt.NOLA(bases=512, rank=16, alpha=4), "all-linear", 573_440),
        (llama_2_70b, lt.LoRA(rank=1), "all-linear", 12_943_360),
        (llama_2_13b, lt.NOLA(bases=512, rank=16, alpha=4), "all-linear", 286_720),
        (llama_2_13b, lt.LoRA(rank=1), "all-linear", 3_911_680),
        (llama_2_7b, lt.NOLA(bases=512, rank=16, alpha=4), "all-linear", 229_376),
        (gpt_2_medium_apart, lt.NOLA(bases=512, rank=8, alpha=8), "q, v", 49_152),
        (gpt_2_medium_apart, lt.LoRA(rank=1), "q, v", 98_304),
        (gpt_2_medium, lt.MergedLoRA(rank=4, alpha=32), "c_attn", 393_216),
        (roberta_base, lt.SVFit(rank=768), "query, value", 18_432),
        (roberta_base, lt.LoLDU(rank=768), "query, value", 18_432),
        (vit(768, 12, 12), lt.SVFit(rank=768), "q_proj, v_proj", 18_432),
        (vit(768, 12, 12), lt.LoLDU(rank=768), "q_proj, v_proj", 18_432),
        (llama_2_7b, lt.LoLDU(rank=768), "q_proj, v_proj", 49_152),
        (sam_vit_b, lt.SALT(top=200, rank=256), "qkv, proj", 6_989_184),
        (sam_vit_b, lt.SALT(top=500, rank=256), "qkv, proj", 3_317_184),
        (sam_vit_b, lt.SALT(top=700, rank=256), "qkv, proj", 869_184),
        (sam_vit_b, lt.SALT(top=760, rank=256), "qkv, proj", 134_784),
        (sam_vit_b, lt.LoRA(rank=256), "qkv, proj", 14_155_776),
        (sam_vit_b, lt.SALT(top=200, rank=256), "qkv, proj, lin1, lin2", 2 * 6_989_184),
        (sam_vit_b, lt.LoRA(rank=256), "qkv, proj, lin1, lin2", 37_748_736),
        (llama_2_7b, lt.SHiRA(fraction=1), "q_proj, k_proj, v_proj, up_proj, down_proj", 4_496_293_888),
        (llama_2_7b, lt.SHiRA(), "q_proj, k_proj, v_proj, up_proj, down_proj", 44_962_944),
        *((vit_b_16, lt.VPT(tokens=p, deep=False), None, 768 * p) for p in (10, 50, 100)),
        (vit_b_16, lt.VPT(tokens=10), None, 92_160),
        (vit_b_16, lt.VPT(tokens=50), None, 460_800),
        (vit_b_16, lt.VPT(tokens=100), None, 921_600),
    ],
)
@pytest.mark.filterwarnings("ignore:.*so some of it is wasted")  # SALT at the paper's ranks
def test_papers_figures(model, method, where, numbers):
    model = model()
    lt.adapt(model, method, where)
    summary = lt.summary(model)
    assert summary.trained == numbers == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert summary.bytes == 4 * numbers


def test_lamda_stores_and_trains_what_its_formulas_say():
    """At rank r: r (in + out) + r^2 in the adapter; of these out * r less at the end, and eta / 2 of that on average."""
    model = llama_2_7b()
    lt.adapt(model, lt.LaMDA(rank=32))
    layers = [layer["default"] for layer in layers_of(model).values()]
    B = sum(t.B.numel() for t in layers)
    assert sum(t.A.numel() + t.B.numel() + t.S.numel() for t in layers) == 79_953_920 + 229_376
    assert (B, sum(t.S.numel() for t in layers)) == (43_515_904, 229_376)
    found = times_fewer_updates(model="llama-2-7b", rank=32, eta=0.3, steps=1000, where="all-linear")
    assert (found["lamda at the first step"], found["lamda at the last step"]) == (43_745_280, 229_376)
    per_step = found["lamda"] / 1000
    assert 229_376 + 0.15 * B <= per_step <= 229_376 + 0.15 * B * 33 / 32  # c(t) is rounded down: half a column more
    assert found["value"] == pytest.approx(79_953_920 / per_step)
