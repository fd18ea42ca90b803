"""An adapted model inside a LightningModule."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loratory as lt

from .loops import adapted, base_is_untouched, reloads_with_equal_logits, rows

lightning = pytest.importorskip("lightning", reason="lightning is not installed (pip install 'loratory[lightning]')")


class Lit(lightning.LightningModule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, data: Any, index: int) -> torch.Tensor:
        loss = self.model(**data).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(lt.param_groups(self.model, lr=3e-3))


def fit(model: Any, tokenizer: Any, folder: Path) -> Lit:
    loader = torch.utils.data.DataLoader(
        rows(tokenizer), batch_size=4, collate_fn=lambda r: {k: torch.tensor([x[k] for x in r]) for k in r[0]}
    )  # type: ignore[arg-type]
    module = Lit(model)
    lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=folder,
    ).fit(module, loader)  # fmt: skip
    return module


def test_lightning(stories: Callable[[], Any], tmp_path: Path) -> None:
    model = adapted(stories, method=lt.LoRA(rank=4), also_train=["model.norm"])
    losses = fit(model, model.tokenizer, tmp_path).losses
    assert losses[-1] < 0.8 * losses[0]
    lt.save(model, tmp_path / "out")
    reloads_with_equal_logits(model, tmp_path / "out", model.tokenizer)
    base_is_untouched(model)


def test_a_layer_without_gradient_is_found_in_lightning_too(stories: Callable[[], Any], tmp_path: Path) -> None:
    model = adapted(stories, where=["q_proj", "lm_head"])
    model.lm_head.forward = lambda x: torch.nn.functional.linear(
        x, model.lm_head.weight
    )  # reads the weight past the adapter
    with pytest.raises(RuntimeError, match="layer 'lm_head' got no gradient in the first step"):
        fit(model, model.tokenizer, tmp_path)
