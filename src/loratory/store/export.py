"""Export to what people already serve: a merged save_pretrained folder, or a PEFT adapter."""

import os
from typing import Any, Literal

from torch import nn

from loratory.runtime import root
from loratory.runtime.layer import COPIES, LAYER
from loratory.runtime.merge import MergeCheck, merge, unmerge
from loratory.runtime.shards import is_main_process, refuse_sharded
from loratory.runtime.state import state_of, unwrap
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
    max_shard_size: int | str | None = None,
) -> MergeCheck | None:
    """Write the adapted model for others; the model itself stays as it is. With several processes the first one writes.

    to="merged": a plain save_pretrained folder (with the tokenizer, if given) that transformers loads without Loratory; the
    merge is checked as `merge` does and its error returned; max_shard_size ("5GB") cuts the weights into files. to="peft": adapter_config.json and adapter_model.safetensors.
    Raises FileExistsError if the folder is not empty; ValueError for a method that PEFT's format cannot hold, or an unknown target.
    """
    model = unwrap(model)
    writes = is_main_process()
    if to == "peft":
        refuse_sharded(
            model,
            "no process holds whole tensors to export",
            "save the adapter and export it in one process (`loratory export`)",
        )
        if not writes:
            return None
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
    if writes:
        atomic.check_free(folder, overwrite=overwrite)
    was_merged = bool(state.merged)
    check = None if was_merged else merge(model, probe=probe, tolerance=tolerance)
    try:
        if writes:
            with atomic.new_folder(folder, overwrite=overwrite) as temporary:
                _save_plain(model, temporary, {} if max_shard_size is None else {"max_shard_size": max_shard_size})
                if tokenizer is not None:
                    tokenizer.save_pretrained(temporary)
    finally:
        if not was_merged:
            unmerge(model)
    return check


def _save_plain(model: Any, folder: os.PathLike[str], options: dict[str, Any]) -> None:
    """transformers' own save_pretrained, with the base's keys only."""
    own = {k: v for k, v in model.state_dict().items() if not {LAYER, COPIES} & set(k.split("."))}
    type(model).__mro__[1].save_pretrained(model, folder, state_dict=own, **options)  # type: ignore[attr-defined]


def _save_pretrained(model: nn.Module, folder: str | os.PathLike[str], *, merged: bool = False, **kwargs: Any) -> None:
    if merged:
        export(model, folder, to="merged", overwrite=True, max_shard_size=kwargs.get("max_shard_size"))
        return
    save(model, folder, is_main_process=kwargs.get("is_main_process"), state_dict=kwargs.get("state_dict"))


root.saver = _save_pretrained
