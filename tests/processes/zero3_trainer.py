"""Program: transformers' own Trainer, under DeepSpeed's ZeRO-3 (`gather` or `keep`: whether DeepSpeed gives a whole state_dict) or `alone`.

python -m tests.processes.zero3_trainer FOLDER gather|keep|alone
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import loratory as lt
from loratory.runtime.shards import is_main_process, is_sharded
from tests.integration.loops import STORIES, rows


def fresh() -> Any:
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    lt.adapt(model, lt.DoRA(rank=4), seed=1, also_train=["model.norm"])
    return model


def config(gather: bool) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": gather,
        },
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def refusal(act: Callable[[], object]) -> str:
    try:
        act()
    except (RuntimeError, ValueError) as e:
        return str(e)
    return "nothing was refused"


def main(folder: Path, how: str) -> None:
    torch.set_num_threads(1)
    model, tokenizer = fresh(), AutoTokenizer.from_pretrained(STORIES)
    arguments = TrainingArguments(
        folder / "run", max_steps=3, per_device_train_batch_size=4 if how == "alone" else 2, learning_rate=3e-3, adam_epsilon=1e-4,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0, max_grad_norm=0.0,
        deepspeed=None if how == "alone" else config(how == "gather"),
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows(tokenizer))
    trainer.train()
    assert is_sharded(model) is (how != "alone")
    found: dict[str, Any] = {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}
    if how == "keep":
        found["refused"] = refusal(lambda: model.save_pretrained(folder / how, state_dict={}))
        found["adapt"] = refusal(fresh)  # from_pretrained shards by itself once TrainingArguments know of ZeRO-3
    else:
        trainer.save_model(str(folder / how))
    if is_main_process():
        (folder / f"{how}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another one still speaks with it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # DeepSpeed's threads are not joined at the interpreter's end, which then sometimes aborts
