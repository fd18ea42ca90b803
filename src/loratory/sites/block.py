"""Block sites: the body of a transformer, for methods that put virtual tokens before the text.

A method for blocks has a field `tokens`, the number n of virtual tokens, and states one of

    prompt(t)         (n, width)                        rows put before the input embeddings
    prefix(t, block)  K and V, each (heads, n, head_dim)  put before the keys and values of an attention block

and `runtime/block.py` keeps the contract, so that from outside the body looks as it did:

    mask       every real token sees all virtual ones, whatever its padding or its document in a packed row; a prompt's own
               tokens see each other as the model's tokens do (causally, or all), and a sliding window slides past them
    positions  virtual tokens take 0 .. n - 1, and real tokens move up by n
    labels     unchanged: outputs of virtual tokens are cut off, so logits and hidden states are as long as the text
    cache      the user's cache holds real tokens only, so its length, cropping and beam order are those of the text
    generate   therefore needs nothing: left padding, beams, static and continued caches work as before
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from loratory.sites.body import BodySite


class BlockSite(BodySite):
    """The body of a transformers model (LlamaModel, GPT2Model, BertModel ...), which takes input embeddings and a mask."""

    def __init__(self, name: str, module: Any, generator: torch.Generator | None = None) -> None:
        super().__init__(name, module, generator)
        self.takes = parameters(module)  # found once: a forward asks for them
        self.causal = self._is_causal()
        self.places = self._learned_places()
        self.counter = next((m for m in module.modules() if hasattr(m, "create_position_ids_from_input_ids")), None)

    @property
    def embedding(self) -> Any:
        return self.module.get_input_embeddings()

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    @property
    def width(self) -> int:
        return self.embedding.embedding_dim

    @property
    def vocabulary(self) -> int:
        return self.embedding.num_embeddings

    @property
    def attentions(self) -> dict[str, nn.Module]:
        """The innermost attention modules that take a cache, by name and in order."""
        found = {
            name: m
            for name, m in self.module.named_modules()
            if "attention" in type(m).__name__.lower() and "past_key_values" in parameters(m)
        }
        return {n: m for n, m in found.items() if not any(other.startswith(n + ".") for other in found)}

    @property
    def blocks(self) -> int:
        """Number of attention blocks. Raises ValueError if none takes keys and values from outside."""
        if not (count := len(self.attentions)):
            raise ValueError(
                f"'{self.name or type(self.module).__name__}' has no attention block that takes a cache, so keys and values cannot be "
                "put before its own; use PromptTuning, which needs none"
            )
        return count

    @property
    def heads(self) -> int:
        """Key and value heads of an attention block."""
        return getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads

    @property
    def head_dim(self) -> int:
        own = getattr(self.config, "head_dim", None)
        return own or self.config.hidden_size // self.config.num_attention_heads

    def _is_causal(self) -> bool:
        """Whether a token sees only those before it."""
        flags = [m.is_causal for m in self.module.modules() if hasattr(m, "is_causal")]
        return all(flags) and getattr(self.config, "is_causal", True)

    def _learned_places(self) -> tuple[int, int] | None:
        """First position and number of positions of a learned table of them; None where there is none."""
        most = getattr(self.config, "max_position_embeddings", None)
        for m in self.module.modules():
            if isinstance(m, nn.Embedding) and m is not self.embedding and m.num_embeddings == most:
                start = 0 if m.padding_idx is None else m.padding_idx + 1
                return start, m.num_embeddings - start
        return None

    def rows(self, ids: tuple[int, ...], count: int) -> Tensor:
        """Input embeddings (count, width) of token ids, which are repeated or cut to the count."""
        with torch.no_grad():
            return self.embedding(self._fitted(ids, count)).detach().clone()

    def keys_values(self, ids: tuple[int, ...], count: int) -> tuple[Tensor, Tensor]:
        """Keys and values (blocks, heads, count, head_dim) that the model itself computes for token ids at 0 .. count - 1."""
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                cache = self.module(input_ids=self._fitted(ids, count)[None], use_cache=True).past_key_values
        finally:
            self.module.train(training)
        if cache is None:
            raise ValueError(
                f"{type(self.module).__name__} keeps no keys and values, so a prefix cannot start from token ids; leave ids out"
            )
        K, V = zip(*((layer.keys[0], layer.values[0]) for layer in cache.layers), strict=True)
        return torch.stack(K).clone(), torch.stack(V).clone()

    def _fitted(self, ids: tuple[int, ...], count: int) -> Tensor:
        if wrong := [i for i in ids if not 0 <= i < self.vocabulary]:
            raise ValueError(
                f"ids holds {wrong[0]}; the model's vocabulary has ids 0 to {self.vocabulary - 1}: take them from its own tokenizer"
            )
        return torch.tensor((ids * -(-count // len(ids)))[:count], device=self.device)


def find_block(name: str, module: Any, generator: torch.Generator | None = None) -> BlockSite:
    """The block site of a model's body, or an error that says why it has none."""
    called = f"'{name}' ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
    config = getattr(module, "config", None)
    if config is None or not {"inputs_embeds", "attention_mask"} <= set(parameters(module)):
        raise TypeError(
            f"{called} is no body of a transformers text model, which virtual tokens could be put before; leave where= out to take the "
            "model's own, or use a method that acts on layers"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{called} is an encoder-decoder; virtual tokens are made for decoders and encoders alone: use a method that acts on layers"
        )
    table = module.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise TypeError(
            f"{called} reads its input through a {type(table).__name__}; virtual tokens need a table of token embeddings"
        )
    others = [
        n
        for n, m in module.named_modules()
        if isinstance(m, nn.Embedding) and m is not table and m.num_embeddings == table.num_embeddings
    ]
    if others:
        raise ValueError(
            f"{called} has a second table of tokens ('{others[0]}'), in which virtual tokens have no row; use a method that acts on layers"
        )
    return BlockSite(name, module, generator)


def parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of what a module's forward takes."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]
