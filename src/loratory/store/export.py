"""Export to what people already serve: a merged save_pretrained folder, a PEFT adapter, or llama.cpp's."""

import os
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from loratory.methods.fields import check_positive_int
from loratory.runtime.layer import is_ours, original_class
from loratory.runtime.low_rank import Approximation, Nearest, nearest_low_rank
from loratory.runtime.merge import MergeCheck, merge, unmerge
from loratory.runtime.shards import is_main_process, refuse_sharded
from loratory.runtime.state import one_name, require_adapter, state_of, unwrap
from loratory.sites.packed import Packed
from loratory.store import atomic
from loratory.store.card import write_card
from loratory.store.gguf import save_gguf
from loratory.store.native import save
from loratory.store.peft import inspect_peft
from loratory.store.peft_write import save_peft
from loratory.store.servers import check_server


def export(
    model: nn.Module,
    folder: str | os.PathLike[str],
    to: Literal["merged", "peft", "gguf"] = "merged",
    *,
    name: str | None = None,
    rank: int | None = None,
    limit: float = 0.05,
    server: Literal["vllm", "lorax"] | None = None,
    tokenizer: Any = None,
    probe: Any = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    card: bool = False,
    dequantize: bool = False,
    max_shard_size: int | str | None = None,
) -> MergeCheck | Approximation | None:
    """Write the adapted model for others; the model itself stays as it is. With several processes the first one writes.

    to="merged": a plain save_pretrained folder (with the tokenizer, if given) that transformers loads without Loratory; the
    merge is checked as `merge` does and its error returned; max_shard_size ("5GB") cuts the weights into files. to="peft": adapter_config.json and adapter_model.safetensors; LoRA, DoRA
    and what equals a LoRA as they are. With `rank`, any method as a plain LoRA of at most that rank: exact where the update has it,
    else the nearest, whose error is returned (and must not be above `limit`, relative to the whole update). to="gguf": the same
    as llama.cpp's `adapter.gguf`; without `rank` for what equals a LoRA.
    card: write a model card (README.md) beside a PEFT adapter.
    dequantize=True writes a quantised base in full precision, with the merged weights unrounded (`probe` then runs on the model as it
    is and on the written folder, loaded again); without it, a base of our own packing cannot be written as "merged".
    server: refuse a PEFT folder that this server would not load, or would read wrongly; the message names every reason.
    Raises FileExistsError if the folder is not empty; ValueError for a method that PEFT's format cannot hold, an unknown target, or
    an error above the limit.
    """
    model = unwrap(model)
    writes = is_main_process()
    if server is not None and to != "peft":
        raise ValueError(
            f"server is {server!r}, which checks PEFT folders, but to is {to!r}; give to='peft', or leave server out"
        )
    if to in ("peft", "gguf"):
        refuse_sharded(
            model,
            "no process holds whole tensors to export",
            "save the adapter and export it in one process (`loratory export`)",
        )
        if not writes:
            return None
        return _export_adapter(model, folder, to, one_name(model, name), rank, limit, server, overwrite, card)
    if to != "merged":
        raise ValueError(f"to is {to!r}; it must be merged, peft or gguf")
    if card:
        raise ValueError(
            "card=True describes an adapter, but to='merged' writes a whole model; leave card out, or export to='peft'"
        )
    if rank is not None:
        raise ValueError(
            f"rank is {rank}, but to='merged' writes whole weights; leave it out, or give to='peft' or 'gguf'"
        )
    if not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"a {type(model).__name__} is no transformers model, so it has no save_pretrained folder; call loratory.merge and save its state_dict"
        )
    state = state_of(model)
    if writes:
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
        if writes:
            with atomic.new_folder(folder, overwrite=overwrite) as temporary:
                _save_plain(model, temporary, {} if max_shard_size is None else {"max_shard_size": max_shard_size})
                if tokenizer is not None:
                    tokenizer.save_pretrained(temporary)
    finally:
        if not was_merged:
            unmerge(model)
    return check


def _export_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    to: str,
    name: str,
    rank: int | None,
    limit: float,
    server: str | None,
    overwrite: bool,
    card: bool,
) -> Approximation | None:
    if card and to != "peft":
        raise ValueError(f"card=True describes a PEFT adapter, but to is {to!r}; leave card out, or export to='peft'")
    atomic.check_free(folder, overwrite=overwrite)
    nearest = None if rank is None and to == "peft" else _nearest(model, name, rank, limit)
    with atomic.new_folder(folder, overwrite=overwrite) as temporary:
        if to == "gguf":
            assert nearest is not None
            save_gguf(model, temporary, name, nearest)
        else:
            save_peft(model, temporary, name=name, nearest=nearest)
            if server is not None:
                check_server(model, temporary, server)
            if card:
                found = inspect_peft(temporary)
                base = found.base | {"class": type(model).__name__}
                write_card(temporary, replace(found, base=base, training=require_adapter(model, name).training))
    return None if nearest is None else nearest.error


def _nearest(model: nn.Module, name: str, rank: int | None, limit: float) -> Nearest:
    """The adapter as a LoRA of at most this rank, within the limit."""
    if rank is not None:
        check_positive_int("rank", rank)
    if not limit >= 0:
        raise ValueError(f"limit is {limit}; it must be a relative error, 0 or more")
    nearest = nearest_low_rank(model, name, rank)
    if not nearest.error.total <= limit:
        raise ValueError(
            f"{nearest.error}; this is above limit={limit:g}, so nothing was written: give a higher rank=, accept the error with limit=, or "
            "write the merged model (to='merged')"
        )
    return nearest


def _save_plain(model: Any, folder: os.PathLike[str], options: dict[str, Any]) -> None:
    """transformers' own save_pretrained, with the base's keys only."""
    own = {k: v for k, v in model.state_dict().items() if not is_ours(k)}
    model._hf_peft_config_loaded = False  # else transformers would look for PEFT's tensors; see runtime.root
    try:
        original_class(model).save_pretrained(model, folder, state_dict=own, **options)
    finally:
        del model._hf_peft_config_loaded


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str], *, merged: bool = False, **kwargs: Any) -> None:
    """What an adapted model's own save_pretrained does: the adapter's folder, or with merged=True the merged model's."""
    if merged:
        export(model, folder, to="merged", overwrite=True, max_shard_size=kwargs.get("max_shard_size"))
        return
    save(model, folder, is_main_process=kwargs.get("is_main_process"), state_dict=kwargs.get("state_dict"))
