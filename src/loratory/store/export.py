"""Export to what people already serve: a merged save_pretrained folder, or a PEFT adapter."""

import os
from typing import Any, Literal

from torch import nn

from loratory.runtime import root
from loratory.runtime.layer import COPIES, LAYER
from loratory.runtime.merge import MergeCheck, merge, unmerge
from loratory.runtime.state import state_of, unwrap
from loratory.sites.packed import Packed
from loratory.store import atomic
from loratory.store.native import save
from loratory.store.peft_write import save_peft


def export(
    model: nn.Module,
    folder: str | os.PathLike[str],
    to: Literal["merged", "peft"] = "merged",
    *,
    name: str | None = None,
    tokenizer: Any = None,
    probe: Any = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    dequantize: bool = False,
) -> MergeCheck | None:
    """Write the adapted model for others; the model itself stays as it is.

    to="merged": a plain save_pretrained folder (with the tokenizer, if given) that transformers loads without Loratory; the
    merge is checked as `merge` does and its error returned. to="peft": adapter_config.json and adapter_model.safetensors.
    dequantize=True writes a quantised base in full precision, with the merged weights unrounded (`probe` then runs on the model as it
    is and on the written folder, loaded again); without it, a base of our own packing cannot be written as "merged".
    Raises FileExistsError if the folder is not empty; ValueError for a method that PEFT's format cannot hold, or an unknown target.
    """
    model = unwrap(model)
    if to == "peft":
        with atomic.new_folder(folder, overwrite=overwrite) as temporary:
            save_peft(model, temporary, name=name)
        return None
    if to != "merged":
        raise ValueError(f"to is {to!r}; it must be merged or peft")
    if not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"a {type(model).__name__} is no transformers model, so it has no save_pretrained folder; call loratory.merge and save its state_dict"
        )
    state = state_of(model)
    atomic.check_free(folder, overwrite=overwrite)
    if dequantize:
        from loratory.store.dequantized import write_dequantized

        with atomic.new_folder(folder, overwrite=overwrite) as temporary:
            written = write_dequantized(model, temporary, probe=probe, tolerance=tolerance)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        return written
    packed = [name for name, m in model.named_modules() if isinstance(m, Packed)]
    if packed:
        raise ValueError(
            f"layer '{packed[0]}' and {len(packed) - 1} more are stored packed, which a plain folder cannot hold; pass dequantize=True (--dequantize) "
            "to write the model in full precision"
        )
    was_merged = bool(state.merged)
    check = None if was_merged else merge(model, probe=probe, tolerance=tolerance)
    try:
        with atomic.new_folder(folder, overwrite=overwrite) as temporary:
            _save_plain(model, temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
    finally:
        if not was_merged:
            unmerge(model)
    return check


def _save_plain(model: Any, folder: os.PathLike[str]) -> None:
    """transformers' own save_pretrained, with the base's keys only."""
    own = {k: v for k, v in model.state_dict().items() if not {LAYER, COPIES} & set(k.split("."))}
    model._hf_peft_config_loaded = False  # else transformers would look for PEFT's tensors; see runtime.root
    try:
        type(model).__mro__[1].save_pretrained(model, folder, state_dict=own)  # type: ignore[attr-defined]
    finally:
        del model._hf_peft_config_loaded


def _save_pretrained(model: nn.Module, folder: str | os.PathLike[str], *, merged: bool = False, **kwargs: Any) -> None:
    if merged:
        export(model, folder, to="merged", overwrite=True)
        return
    if kwargs.get("is_main_process", True):
        save(model, folder)


root.saver = _save_pretrained
