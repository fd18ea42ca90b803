"""A little text, an adapter on stories260k, and what every loop must have done in the end."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import loratory as lt

STORIES = Path(__file__).parents[1] / "models" / "stories260k"
TEXT = [
    "Once upon a time there was a red ball. Tom liked the ball.",
    "Lily saw a big cat in the park. The cat was sad.",
    "One day, a little bird flew to the sun. It was hot.",
    "Mom said, go to bed. Ben did not want to go to bed.",
]


def rows(tokenizer: Any, length: int = 24) -> list[dict[str, list[int]]]:
    """Token ids of one length, each its own label."""
    out = []
    for text in TEXT * 4:
        ids = (tokenizer(text)["input_ids"] * 3)[:length]
        out.append({"input_ids": ids, "attention_mask": [1] * length, "labels": ids})
    return out


def batch(tokenizer: Any) -> dict[str, torch.Tensor]:
    return {
        key: torch.tensor([row[key] for row in rows(tokenizer)[:4]])
        for key in ("input_ids", "attention_mask", "labels")
    }


def adapted(stories: Any, **options: Any) -> Any:
    model = stories()
    lt.adapt(model, **({"method": lt.LoRA(rank=4), "where": "all-linear"} | options))
    return model


def reloads_with_equal_logits(model: Any, folder: Path, tokenizer: Any) -> None:
    """The folder is an adapter, and on a fresh base it gives the model's own logits."""
    assert (folder / "adapter.json").exists()
    assert not list(folder.glob("model*.safetensors"))
    fresh = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    x = batch(tokenizer)["input_ids"]
    with torch.no_grad():
        plain = fresh(x).logits
        lt.load(fresh, folder)
        mine, theirs = model.eval()(x).logits, fresh(x).logits
    assert torch.equal(mine, theirs)
    assert not torch.allclose(mine, plain, atol=1e-3)


def base_is_untouched(model: Any) -> None:
    fresh = AutoModelForCausalLM.from_pretrained(STORIES)
    lt.detach(model)
    mine = model.state_dict()
    assert all(torch.equal(mine[k], v) for k, v in fresh.state_dict().items())
