"""The root of an adapted transformers model: its save_pretrained writes the adapter, not a full model that nothing could load.

Trainer, SFTTrainer and Accelerate save by calling it. The store stands above the runtime, so it is asked for when a model is saved.
"""

import os
from functools import cache
from importlib import import_module
from typing import Any

from torch import nn

from loratory.runtime.layer import subclass, swap_class

SAVER = "loratory.store.export"  # its save_pretrained


def swap_root(model: Any) -> None:
    if hasattr(model, "save_pretrained"):
        swap_class(model, _saving_class(model.__class__, bool(getattr(model, "is_quantized", False))))


@cache
def _saving_class(cls: Any, quantized: bool) -> type[nn.Module]:
    def save_pretrained(
        self: Any, save_directory: str | os.PathLike[str], *, merged: bool = False, **kwargs: Any
    ) -> None:
        """Write the active adapter's folder; with merged=True the merged model as transformers writes it."""
        import_module(SAVER).save_pretrained(self, save_directory, merged=merged, **kwargs)

    # Trainer trains a quantised model only if it is told of adapters
    told = {"_hf_peft_config_loaded": True} if quantized else {}
    return subclass(cls, {"save_pretrained": save_pretrained, **told}, _saving_class, quantized)
