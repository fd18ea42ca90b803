"""Views of a user's cache of keys and values: the cache keeps real tokens only, the model sees virtual ones before them."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

KEPT = "_loratory_prompt"  # attribute of a user's cache: keys and values of the prompt that it was filled after


class PrefixedKeys:
    """What an attention block sees as its cache under prefix tuning: real keys and values, and K, V before them."""

    def __init__(self, real: Any, K: Tensor, V: Tensor, end: int | None, block: int) -> None:
        self.real, self.K, self.V, self.block = real, K, V, block
        self.end = end  # real keys up to here; a static cache returns empty places too

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self.__dict__.get("real") is None:
            raise AttributeError(name)
        return getattr(self.real, name)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if (keys.shape[1], keys.shape[3]) != (self.K.shape[0], self.K.shape[2]):
            raise RuntimeError(
                f"attention block {self.block} has {keys.shape[1]} key heads of {keys.shape[3]}, but the model's config gives "
                f"{self.K.shape[0]} of {self.K.shape[2]}, so the prefix does not fit; use PromptTuning"
            )
        if self.real is not None:
            keys, values = self.real.update(keys, values, layer_idx, *args, **kwargs)
        if self.end is not None:
            keys, values = keys[:, :, : self.end], values[:, :, : self.end]
        return before(self.K, keys), before(self.V, values)


def before(own: Tensor, states: Tensor) -> Tensor:
    """states (batch, heads, length, head_dim) with own (heads, n, head_dim) or (batch or 1, heads, n, head_dim) in front."""
    own = own if own.dim() == 4 else own[None]
    return torch.cat([own.to(states).expand(states.shape[0], -1, -1, -1), states], 2)


def prompted_cache(config: Any, real: Any, n: int, owner: object) -> Any:
    """The view of a cache (a new one, if None) for a prompt of n tokens.

    Raises RuntimeError if the cache was filled without this prompt.
    """
    if real is None:
        from transformers import DynamicCache

        real = DynamicCache(config=config)
    kept = real.__dict__.get(KEPT)
    first = not int(real.get_seq_length())
    if first:
        kept = real.__dict__[KEPT] = {"owner": id(owner), "tensors": {}}
    elif kept is None or kept["owner"] != id(owner):
        raise RuntimeError(
            "past_key_values was filled without the active prompt (with another adapter, or with none); start from an empty cache"
        )
    return _prompted_class()(real, n, first, kept["tensors"])


@cache
def _prompted_class() -> Any:
    from transformers import Cache

    class PromptedCache(Cache):
        """A cache whose first n tokens, those of the prompt, are kept beside the user's."""

        def __init__(self, real: Any, n: int, first: bool, kept: dict[int, tuple[Tensor, Tensor]]) -> None:
            self.real, self.n, self.first, self.kept = real, n, first, kept
            self.whole = False  # the mask was given whole, with columns for the prompt in every block

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__") or "real" not in self.__dict__:
                raise AttributeError(name)
            return getattr(self.real, name)

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            n = self.n
            if self.first:
                own = key_states[:, :, :n], value_states[:, :, :n]
                key_states, value_states = key_states[:, :, n:], value_states[:, :, n:]
                self.kept[layer_idx] = own[0][:1], own[1][:1]  # the same in every row: nothing stands before them
            else:
                own = self.kept[layer_idx]
            beyond = not self.whole and self.real.get_mask_sizes(key_states.shape[2], layer_idx)[1]
            keys, values = self.real.update(key_states, value_states, layer_idx, *args, **kwargs)
            if beyond:  # the window has slid past the prompt
                return keys, values
            return before(own[0], keys), before(own[1], values)

        def get_seq_length(self, layer_idx: int = 0) -> Any:
            seen = self.real.get_seq_length(layer_idx)
            return seen if self.first else seen + self.n

        def get_query_offset(self, layer_idx: int = 0) -> Any:
            return self.get_seq_length(layer_idx)

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            length, start = self.real.get_mask_sizes(query_length - (self.n if self.first else 0), layer_idx)
            return (length, start + self.n) if start else (length + self.n, 0)

    return PromptedCache
