"""An adapter and its base, opened for use: what eval, generate, chat, merge and export start from."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loratory as lt
from loratory.tasks import TASKS, Task, make_task


@dataclass(frozen=True)
class Opened:
    """A model with its adapter active."""

    model: Any
    tokenizer: Any
    task: Task | None  # as it was trained; None where the adapter's file does not say
    training: dict[str, Any]  # the record of the run that trained it; empty if there is none
    base: str
    bridged: bool = False  # a tuner of PEFT: the model is a PeftModel

    def without(self) -> AbstractContextManager[Any]:
        """The base alone inside a block."""
        return self.model.disable_adapter() if self.bridged else lt.disabled(self.model)


def open_adapter(
    folder: str | Path,
    base: str | None = None,
    *,
    task: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
) -> Opened:
    """The base with the adapter of a folder (an adapter's, PEFT's or a run's output_dir), ready to answer.

    base and task default to what the adapter's file says. Raises ValueError if they are neither given nor recorded.
    """
    from loratory.train import peft_bridge
    from loratory.train.base import load_base
    from loratory.train.run import pick_device

    bridged = peft_bridge.find_bridged(folder)
    found = peft_bridge.inspect_bridged(bridged) if bridged is not None else lt.inspect(folder)
    training = found.training or {}
    settings = training.get("settings", {})
    source = base or training.get("base") or found.base.get("name")
    if not source:
        raise ValueError(f"'{found.folder}' does not say which base it belongs to; give it with --base")
    recorded = training.get("task")
    made = (
        make_task(task)
        if task is not None and task != (recorded or {}).get("name")
        else make_task(**recorded)
        if recorded
        else None
    )
    auto_class = made.auto_class if made is not None else auto_class_of(found.base.get("class") or "")
    model, tokenizer = load_base(
        source,
        auto_class,
        dtype=dtype or settings.get("dtype", "float32"),
        device=pick_device(device),
        revision=settings.get("revision"),
        trust_remote_code=bool(settings.get("trust_remote_code", False)),
        base_format=settings.get("base_format", "unpacked"),
        processor_class=made.processor_class if made is not None else processor_of(auto_class),
        **(made.model_kwargs() if made is not None else {}),
    )
    if settings.get("quantize") is not None:
        lt.quantize(model, settings["quantize"], exclude=list(settings.get("also_train") or ()) or None)
    if bridged is not None:
        model = peft_bridge.load_bridged(model, bridged, other_precision=dtype is not None)
    else:
        lt.load(model, found.folder, other_precision=dtype is not None)
    model.eval()
    return Opened(model, tokenizer, made, training, str(source), bridged is not None)


def processor_of(auto_class: str) -> str:
    return next((task.processor_class for task in TASKS.values() if task.auto_class == auto_class), "AutoTokenizer")


def auto_class_of(class_name: str) -> str:
    """The Auto class for a model class such as LlamaForCausalLM; causal language models where nothing is known."""
    for task in TASKS.values():
        if class_name.endswith(task.auto_class.removeprefix("AutoModel")):
            return task.auto_class
    return "AutoModelForSeq2SeqLM" if class_name.endswith("ConditionalGeneration") else "AutoModelForCausalLM"
