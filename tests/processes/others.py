"""Program: transformers' own Trainer and a loop with Accelerate, both sharding by FSDP2.

python -m tests.processes.others FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import loratory as lt
from loratory.runtime.shards import is_sharded
from tests.integration.loops import STORIES, batch, rows
from tests.processes import fsdp_on_cpu


def fresh() -> Any:
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    lt.adapt(model, lt.DoRA(rank=4), seed=1, also_train=["model.norm"])
    return model


def with_trainer(folder: Path) -> None:
    model, tokenizer = fresh(), AutoTokenizer.from_pretrained(STORIES)
    arguments = TrainingArguments(
        folder / "run", max_steps=3, per_device_train_batch_size=2, learning_rate=3e-3, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, seed=0, fsdp=True, fsdp_config={"version": 2},
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows(tokenizer))
    trainer.train()
    assert is_sharded(model)
    trainer.save_model(str(folder / "by trainer"))  # the first process alone saves, from a gathered state_dict
    lt.save(model, folder / "by all")


def with_accelerate(folder: Path) -> None:
    AcceleratorState._reset_state(True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = fresh()
    optimizer = torch.optim.AdamW(lt.param_groups(model, lr=3e-3), eps=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert is_sharded(model)
    data = batch(AutoTokenizer.from_pretrained(STORIES))
    for _ in range(3):
        number = accelerator.process_index
        accelerator.backward(model(**{key: value[2 * number : 2 * number + 2] for key, value in data.items()}).loss)
        optimizer.step()
        optimizer.zero_grad()
    whole = accelerator.get_state_dict(model)
    main = accelerator.is_main_process
    accelerator.unwrap_model(model).save_pretrained(folder / "from dict", is_main_process=main, state_dict=whole)
    accelerator.unwrap_model(model).save_pretrained(folder / "gathered", is_main_process=main)
    alone = fresh()
    optimizer = torch.optim.AdamW(lt.param_groups(alone, lr=3e-3), eps=1e-4)
    for _ in range(3):
        alone(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lt.save(alone, folder / "alone")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert fsdp_on_cpu.usual is not AcceleratorState.__init__
    with_trainer(Path(sys.argv[1]))
    with_accelerate(Path(sys.argv[1]))
