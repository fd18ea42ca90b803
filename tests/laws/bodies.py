"""The bodies of models that methods for virtual tokens must serve, each with rows to read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import loratory as lt


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, **options))


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=4, n_positions=40))


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5))


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))


def bare_bert() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**SIZES))


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**PATCHES, num_labels=3))


def bare_vit() -> Any:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**PATCHES))


def deit() -> Any:
    from transformers import DeiTConfig, DeiTForImageClassification

    return DeiTForImageClassification(DeiTConfig(**PATCHES, num_labels=3))


def dinov2() -> Any:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    return Dinov2ForImageClassification(Dinov2Config(**PATCHES, mlp_ratio=2, num_labels=3))


def dinov3() -> Any:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    return DINOv3ViTModel(DINOv3ViTConfig(**PATCHES, num_register_tokens=2))


def clip() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**PATCHES))


SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
PATCHES = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
CAUSAL: dict[str, Callable[[], Any]] = {"Llama": llama, "Qwen3": qwen3, "GPT-2": gpt2, "Mistral": mistral}
BODIES = CAUSAL | {"BERT": bert, "bare BERT": bare_bert}
VISION: dict[str, Callable[[], Any]] = {
    "ViT": vit,
    "bare ViT": bare_vit,
    "DeiT": deit,
    "DINOv2": dinov2,
    "DINOv3": dinov3,
    "CLIP": clip,
}
IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35], [8, 9, 7, 9, 3, 2, 3]])
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
FIRST = (5, 30, 7)  # tokens that a method may start from


class Case(NamedTuple):
    """A method on a body."""

    make: Callable[[], Any]
    method: lt.Method

    def plain(self, dtype: torch.dtype = torch.float32) -> Any:
        """The model before anything is attached, the same at every call, with weights large enough to matter."""
        torch.manual_seed(1)
        model = self.make()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4 if p.dim() > 1 else 1)
        return model.to(dtype).eval()

    def adapted(self, dtype: torch.dtype = torch.float32, name: str = "default") -> Any:
        model = self.plain(dtype)
        torch.manual_seed(2)
        lt.adapt(model, self.method, name=name)
        return model


@dataclass(frozen=True, kw_only=True)
class BodyRow:
    """What one method on bodies promises; each test file of such a method holds its own as ROW."""

    made: dict[str, lt.Method]  # instances to test on every body, by label
    count: Callable[[Any, Any], int]  # trained numbers, by the formula of the docstring, of (method, site)
    bodies: dict[str, Callable[[], Any]]  # those it serves
    variants: dict[str, lt.Method] = field(default_factory=dict)  # instances to test on the first body alone

    def cases(self) -> list[Any]:
        first = dict(list(self.bodies.items())[:1])
        return cases(self.bodies, self.made) + cases(first, self.variants)


def outputs(model: Any, *inputs: Tensor | None, **options: Any) -> Tensor:
    if not inputs:
        inputs = (IDS if model.main_input_name == "input_ids" else PIXELS,)
    return model(*inputs, **options)[0]


METHODS = {
    "prompt": lt.PromptTuning(tokens=3),
    "prefix": lt.PrefixTuning(tokens=3),
    "prefix through a network": lt.PrefixTuning(tokens=3, hidden=5),
}
VISION_METHODS = {
    "VPT": lt.VPT(tokens=3),
    "shallow VPT": lt.VPT(tokens=2, deep=False),
    "VPT through a layer": lt.VPT(tokens=3, hidden=5),
}


def cases(bodies: dict[str, Callable[[], Any]], methods: dict[str, lt.Method]) -> list[Any]:
    return [
        pytest.param(Case(make, method), id=f"{label}-{name}")
        for label, method in methods.items()
        for name, make in bodies.items()
    ]
