"""What a model takes and gives, divided among groups of batch rows and joined again: tensors, nested values, caches."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loratory.runtime.cache import KEPT

_DIVIDED = "_loratory_divided"  # attribute of a user's cache: what each group keeps of its prompt
_WHOLE = ("cache_position", "logits_to_keep", "num_items_in_batch")  # arguments that speak of all rows
_SHARED_MASKS = ("attn_mask", "mask", "memory_mask", "src_mask", "tgt_mask")  # torch's masks over two lengths


class Groups(NamedTuple):
    """Which rows of a batch each group has; `dim`: where a model's inputs and outputs hold the rows."""

    rows: list[list[int]]
    dim: int = 0

    @property
    def size(self) -> int:
        return sum(map(len, self.rows))

    def spread(self, copies: int) -> "Groups":
        """The same where each row stands for several sequences."""
        return Groups([[i * copies + k for i in rows for k in range(copies)] for rows in self.rows], self.dim)


def take(value: Any, groups: Groups, g: int, name: str = "") -> Any:
    """The rows of group g. Tensors without a dimension of the batch's length are shared by all groups."""
    if isinstance(value, Tensor):
        at = _where(value, groups, name)
        return value if at is None else value.index_select(at, torch.tensor(groups.rows[g], device=value.device))
    if (name.startswith("cu_seq_lens") and value is not None) or type(value).__name__ == "BlockMask":
        raise _indivisible(name, f"a {type(value).__name__}")
    if isinstance(value, Mapping):
        made = {k: take(v, groups, g, k if isinstance(k, str) else name) for k, v in value.items()}
        return made if type(value) is dict else type(value)(**made)
    if isinstance(value, list | tuple):
        return _like(value, [take(v, groups, g, name) for v in value])
    if is_cache(value):
        out = copied(value, lambda t: take(t, Groups(groups.rows), g) if t.dim() else t.clone())
        kept = out.__dict__.pop(_DIVIDED, None)
        if kept is not None:
            out.__dict__.pop(KEPT, None)
            out.__dict__ |= {} if kept[g] is None else {KEPT: kept[g]}
        return out
    return value


def join(parts: Sequence[Any], groups: Groups, known: Mapping[int, Any] | None = None, name: str = "") -> Any:
    """The whole of what the groups gave. `known`: by the id of a value of the first group, what replaces it."""
    first = parts[0]
    if known and id(first) in known:
        return known[id(first)]
    if isinstance(first, Tensor):
        return _joined(parts, groups, name)
    if isinstance(first, Mapping):
        made = {k: join([p[k] for p in parts], groups, known, k if isinstance(k, str) else name) for k in first}
        return made if type(first) is dict else type(first)(**made)
    if isinstance(first, list | tuple):
        return _like(first, [join(each, groups, known, name) for each in zip(*parts, strict=True)])
    return join_caches(parts, groups) if is_cache(first) else first


def is_cache(value: Any) -> bool:
    """Whether this is a cache of transformers, or a layer of one. Raises ValueError for one that cannot be divided."""
    found = any(c.__module__ == "transformers.cache_utils" for c in type(value).__mro__)
    name = type(value).__name__
    if "Quantized" in name or "Indexed" in name if found else name.endswith("Cache"):
        raise _indivisible("past_key_values", f"a {name}")
    return found


def copied(value: Any, each: Callable[[Tensor], Tensor]) -> Any:
    """A cache with `each` of its tensors."""
    if isinstance(value, Tensor):
        return each(value)
    if isinstance(value, dict):
        return {k: copied(v, each) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return _like(value, [copied(v, each) for v in value])
    if not is_cache(value):
        return value
    out = copy.copy(value)
    out.__dict__ = {k: copied(v, each) for k, v in value.__dict__.items()}
    return out


def join_caches(parts: Sequence[Any], groups: Groups) -> Any:
    """One cache with the rows of all."""
    kept = [p.__dict__.pop(KEPT, None) for p in parts]
    out = copy.copy(parts[0])
    out.__dict__ = {k: join([p.__dict__[k] for p in parts], Groups(groups.rows)) for k in parts[0].__dict__}
    if any(k is not None for k in kept):
        out.__dict__[_DIVIDED] = kept
    if "batch_size" in out.__dict__ and isinstance(getattr(out, "keys", None), Tensor):
        out.batch_size = out.keys.shape[0]
    return out


def put_cache(target: Any, source: Any) -> None:
    """Give a user's cache the contents of another, in its own objects (a static cache's tensors keep their place)."""
    for gone in target.__dict__.keys() - source.__dict__.keys():
        del target.__dict__[gone]
    for key, value in source.__dict__.items():
        own = target.__dict__.get(key)
        if isinstance(own, Tensor) and isinstance(value, Tensor) and own.shape == value.shape:
            target.__dict__[key] = value if value.requires_grad or own.is_inference() else own.detach().copy_(value)
        elif isinstance(own, list) and key == "layers":
            for mine, other in zip(own, value, strict=False):
                put_cache(mine, other)
            own[:] = own[: len(value)] + value[len(own) :]
        elif is_cache(value) and type(own) is type(value):
            put_cache(own, value)
        else:
            target.__dict__[key] = value


def _where(value: Tensor, groups: Groups, name: str) -> int | None:
    """The dimension that holds the rows."""
    if name.startswith("cu_seq_lens"):
        raise _indivisible(name, "for packed rows")
    if name in _WHOLE or (name in _SHARED_MASKS and value.dim() == 2):
        return None
    if name == "position_ids" and value.dim() == 3:  # one set of positions for each axis of a picture stands first
        return 1 if value.shape[1] == groups.size else None
    holds = [d for d in dict.fromkeys((groups.dim, 0)) if d < value.dim() and value.shape[d] == groups.size]
    if len(holds) > 1 and value.dim() == 2:
        raise _indivisible(
            name or "an input", f"of shape {tuple(value.shape)}, of which both dimensions may be the rows"
        )
    return holds[0] if holds else None


def _joined(parts: Sequence[Tensor], groups: Groups, name: str) -> Tensor:
    counts = [len(rows) for rows in groups.rows]
    order = [i for rows in groups.rows for i in rows]
    back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=parts[0].device)
    for d in dict.fromkeys((groups.dim, 0)):
        if all(d < p.dim() and p.shape[d] == n for p, n in zip(parts, counts, strict=True)):
            return torch.cat(list(parts), d).index_select(d, back)
    if all(p.shape == parts[0].shape and torch.equal(p, parts[0]) for p in parts):
        return parts[0]
    per = parts[0].shape[0] // counts[0] if parts[0].dim() else 0  # entries of a row, one after the other
    if per and all(p.dim() and p.shape[0] == n * per for p, n in zip(parts, counts, strict=True)):
        return torch.cat([p.unflatten(0, (-1, per)) for p in parts]).index_select(0, back).flatten(0, 1)
    raise ValueError(
        f"the model gives '{name or 'an output'}' of shape {tuple(parts[0].shape)} over all rows at once, which rows that run in groups "
        "cannot give; leave it out (for a loss: call the model without labels and take the loss of its logits), or run the rows one adapter "
        "after the other"
    )


def _like(value: Any, items: list[Any]) -> Any:
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _indivisible(name: str, what: str) -> ValueError:
    return ValueError(
        f"'{name}' is {what}, which cannot be divided among groups of rows; leave it out, or run the rows one adapter after the other"
    )
