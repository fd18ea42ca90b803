"""Writes adapter folders of the present format version, which test_stored.py loads for ever after.

    python -m tests.stored.make [CASE ...]

Each case is a folder tests/stored/v<version>/<case> with the adapter, and in expected.safetensors an input and the output for it.
What is there is never written again: a file made today must stay readable as it is.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import loratory as lt
from loratory.store.native import VERSION
from tests.oracle.pairs import randomised

HERE = Path(__file__).parent
EXPECTED = "expected.safetensors"


def numbered(model: nn.Module) -> nn.Module:
    """Weights by exact arithmetic: no generator, no library and no processor changes them."""
    for i, p in enumerate(model.parameters()):
        order = torch.arange(p.numel()).mul(37).add(11 * i).remainder(101).sub(50)
        p.data = (order / 128).reshape(p.shape).to(p.dtype)
    return model.eval()


class Words(nn.Module):
    """An embedding, one attention with q, k, v in one weight, a head."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.qkv, self.out = nn.Linear(8, 24), Conv1D(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + self.out(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)
        return self.head(self.norm(x))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class Picture(nn.Module):
    """Two convolutions, one of them grouped, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, groups=2, padding=1), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 6, 2, stride=2), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.norm(self.first(x)))).flatten(1))


def stories() -> Any:
    model = AutoModelForCausalLM.from_pretrained(HERE.parent / "models" / "stories260k").eval()
    model.config._name_or_path = "stories260k"  # not where it lies on the machine that made the files
    return model


def words(**options: Any) -> Callable[[], nn.Module]:
    return lambda: numbered(Words(**options))


class Case(NamedTuple):
    base: Callable[[], Any]
    options: dict[str, Any]


CASES = {
    "lora": Case(stories, {"method": lt.LoRA(rank=2, alpha=3), "where": ["q_proj", "down_proj"]}),
    "dora-per-layer": Case(
        stories,
        {
            "method": lt.DoRA(rank=2),
            "where": ["v_proj"],
            "per_layer": {
                "layers.1.self_attn.v_proj": {"rank": 1, "alpha": 4.0},
                "layers.3.self_attn.v_proj": {"rslora": True},
            },
        },
    ),
    "merged-lora": Case(
        words(), {"method": lt.MergedLoRA(groups=(True, False, True), rank=2, alpha=3), "where": ["qkv"]}
    ),
    "conv1d-of-transformers": Case(words(), {"method": lt.LoRA(rank=2, rslora=True), "where": ["out"]}),
    "embedding": Case(words(), {"method": lt.LoRA(rank=2, alpha=5), "where": ["embed", "head"]}),
    "embedding-dora": Case(words(), {"method": lt.DoRA(rank=2), "where": ["embed"]}),
    "lora-plus": Case(
        words(), {"method": lt.LoRA(rank=2, dropout=0.25, lr_ratio=16.0, start="gaussian"), "where": ["qkv", "head"]}
    ),
    "also-train-and-bias": Case(
        words(), {"method": lt.LoRA(rank=1), "where": ["qkv"], "also_train": ["norm"], "bias": "adapted"}
    ),
    "tied": Case(words(tied=True), {"method": lt.LoRA(rank=1), "where": ["qkv"], "also_train": ["embed"]}),
    "tied-parted": Case(
        words(tied=True), {"method": lt.LoRA(rank=1), "where": ["qkv"], "also_train": ["head"], "untie": True}
    ),
    "conv": Case(lambda: numbered(Picture()), {"method": lt.LoRA(rank=1), "where": ["first", "second", "head"]}),
    "conv-dora": Case(lambda: numbered(Picture()), {"method": lt.DoRA(rank=1), "where": ["first", "second"]}),
    "also-train-buffers": Case(
        lambda: numbered(Picture()), {"method": lt.LoRA(rank=1), "where": ["head"], "also_train": ["norm"]}
    ),
    "bfloat16": Case(lambda: numbered(Words().bfloat16()), {"method": lt.LoRA(rank=2), "where": ["qkv", "embed"]}),
    "full": Case(words(), {"method": lt.Full()}),
    "head-only": Case(words(), {"method": lt.HeadOnly()}),
}


def inputs(base: nn.Module) -> Tensor:
    if isinstance(base, Picture):
        return (torch.arange(2 * 2 * 4 * 4).mul(7).remainder(23).sub(11) / 16).reshape(2, 2, 4, 4)
    return (
        torch.tensor([[1, 9, 4, 7], [2, 2, 10, 3]]) if isinstance(base, Words) else torch.tensor([[1, 403, 407, 261]])
    )


def outputs(model: Any, x: Tensor) -> Tensor:
    """In double precision, where no processor's order of summing matters. The model is left in it."""
    with torch.no_grad():
        out = model.double().eval()(x.double() if x.is_floating_point() else x)
    return out.logits if hasattr(out, "logits") else out


def make(name: str, folder: Path) -> None:
    """Raises FileExistsError if the folder exists."""
    if folder.exists():
        raise FileExistsError(f"'{folder}' exists; stored files are never written again, so give the case another name")
    model = CASES[name].base()
    x = inputs(model)
    lt.adapt(model, **CASES[name].options)
    randomised(model)
    if isinstance(model, Picture) and "also_train" in CASES[name].options:  # its own running means, not a fresh layer's
        model.train()(x)
    lt.save(model.eval(), folder, training={"case": name, "seed": 1})
    save_file({"inputs": x, "outputs": outputs(model, x).float()}, folder / EXPECTED)


if __name__ == "__main__":
    version = HERE / f"v{VERSION}"
    for each in sys.argv[1:] or CASES:
        make(each, version / each)
        print(f"wrote {version / each}")
