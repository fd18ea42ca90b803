"""An adapted model trains unchanged in a plain loop, transformers' Trainer, TRL's SFTTrainer and Accelerate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loratory as lt

from .loops import TEXT, adapted, base_is_untouched, batch, reloads_with_equal_logits, rows

METHODS = {"lora": lt.LoRA(rank=4, lr_ratio=4.0), "dora": lt.DoRA(rank=4)}
ADAPTED: dict[str, Any] = {"where": "all-linear", "also_train": ["model.norm"]}


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_loop(method: str, stories: Callable[[], Any], tmp_path: Path) -> None:
    model = adapted(stories, method=METHODS[method], **ADAPTED)
    data = batch(model.tokenizer)
    optimizer = torch.optim.AdamW(lt.param_groups(model, lr=3e-3, weight_decay=0.01))
    losses = []
    for _ in range(12):
        loss = model.train()(**data).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    lt.save(model, tmp_path / "out")
    reloads_with_equal_logits(model, tmp_path / "out", model.tokenizer)
    base_is_untouched(model)


def test_trainer_of_transformers(stories: Callable[[], Any], tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = adapted(stories, method=METHODS["lora"], **ADAPTED)
    tokenizer = model.tokenizer
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=12, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=1, save_steps=6, report_to=[],
        use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows(tokenizer), processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    trainer.save_model(str(tmp_path / "out"))
    reloads_with_equal_logits(model, tmp_path / "out", tokenizer)
    reloads_with_equal_logits(model, tmp_path / "run" / "checkpoint-12", tokenizer)
    assert lt.inspect(tmp_path / "run" / "checkpoint-6").numbers == sum(p.numel() for p in lt.trained(model).values())
    base_is_untouched(model)


def test_sft_trainer_of_trl(stories: Callable[[], Any], tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = adapted(stories, method=METHODS["lora"], where="attention")
    tokenizer = model.tokenizer
    config = SFTConfig(
        str(tmp_path / "run"), max_steps=10, per_device_train_batch_size=8, learning_rate=5e-3, logging_steps=1, save_steps=10, report_to=[],
        use_cpu=True, bf16=False, disable_tqdm=True, max_length=24, gradient_checkpointing=True, seed=0,
    )  # fmt: skip
    data = Dataset.from_dict({"text": [text * 2 for text in TEXT] * 4})
    trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    trainer.save_model(str(tmp_path / "out"))
    reloads_with_equal_logits(model, tmp_path / "out", tokenizer)
    reloads_with_equal_logits(model, tmp_path / "run" / "checkpoint-10", tokenizer)


@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_trainers_log_the_same_losses_with_the_lean_one(kind: str, stories: Callable[[], Any], tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    given = {
        "max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 5e-3, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    data = Dataset.from_dict(
        {"prompt": [f"{text} And" for text in TEXT] * 8, "completion": [f" so {text}" for text in TEXT] * 8}
    )
    losses: dict[str, Any] = {}
    for own in (True, False):
        model = adapted(stories, method=METHODS["lora"], where="attention", seed=1)
        if kind == "trl":
            config = SFTConfig(str(tmp_path / "run"), bf16=False, max_length=32, gradient_checkpointing=False, **given)
            trainer: Any = SFTTrainer(model, args=config, train_dataset=data, processing_class=model.tokenizer)
        else:
            arguments = TrainingArguments(str(tmp_path / "run"), **given)
            trainer = Trainer(model, arguments, train_dataset=rows(model.tokenizer), processing_class=model.tokenizer)
        if not own:
            assert lt.lean_loss(model, chunk=16).aside is None
        trainer.train()
        losses[str(own)] = [
            {key: entry[key] for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy") if key in entry}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
    assert len(losses["True"]) == 3
    for theirs, ours in zip(losses["True"], losses["False"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_accelerate(stories: Callable[[], Any], tmp_path: Path) -> None:
    from accelerate import Accelerator

    model = adapted(stories, method=METHODS["dora"], where="mlp")
    tokenizer = model.tokenizer
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(lt.param_groups(model, lr=5e-3))
    loader = torch.utils.data.DataLoader(
        rows(tokenizer), batch_size=4, collate_fn=lambda r: {k: torch.tensor([x[k] for x in r]) for k in r[0]}
    )  # type: ignore[arg-type]
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(5):
        for data in loader:
            with accelerator.accumulate(prepared):
                loss = prepared(**data).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    accelerator.unwrap_model(prepared).save_pretrained(
        tmp_path / "out", is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )
    reloads_with_equal_logits(model, tmp_path / "out", tokenizer)
    accelerator.save_state(str(tmp_path / "state"))
    wanted = {n: p.clone() for n, p in lt.trained(model).items()}
    with torch.no_grad():
        for p in lt.trained(model).values():
            p.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert all(torch.equal(p, wanted[n]) for n, p in lt.trained(model).items())


def test_a_second_process_does_not_write(stories: Callable[[], Any], tmp_path: Path) -> None:
    adapted(stories).save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()
