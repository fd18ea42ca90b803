"""Generation for many prompts at once, padded on the left so that every row ends where its answer begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loratory.tasks.likelihood import answering
from loratory.tasks.task import PadBatch, pad_id


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the model's own and the tokenizer's."""
    own = model.generation_config.eos_token_id
    ids = set(own) if isinstance(own, list) else {own}
    return sorted((ids | {tokenizer.eos_token_id}) - {None})


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    origins: Sequence[str] | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    **generation: Any,
) -> list[str]:
    """The text that follows each prompt (token ids), in order. Raises ValueError for a prompt that leaves no room.

    An encoder-decoder reads the prompts and its answers begin afresh; other models continue the prompts.
    """
    encoder = bool(model.config.is_encoder_decoder)
    limit = None if encoder else getattr(model.config, "max_position_embeddings", None)
    for index, prompt in enumerate(prompts):
        where = origins[index] if origins else f"prompt {index + 1}"
        if not prompt:
            raise ValueError(f"{where}: the prompt has no tokens, so there is nothing to answer")
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"{where}: the prompt has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}, but the model "
                f"has {limit} positions; lower max_new_tokens or shorten the prompt"
            )
    collate = PadBatch(pad_id(tokenizer), side="right" if encoder else "left")
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    texts = [""] * len(prompts)
    with answering(model):
        for start in range(0, len(prompts), batch_size):
            chosen = by_length[start : start + batch_size]
            batch = collate([{"input_ids": prompts[i], "attention_mask": [1] * len(prompts[i])} for i in chosen])
            output = model.generate(
                **{key: value.to(model.device) for key, value in batch.items()},
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                pad_token_id=collate.pad_id,
                eos_token_id=end_ids(model, tokenizer) or None,
                **generation,
            )
            answers = output if encoder else output[:, batch["input_ids"].shape[1] :]
            for i, answer in zip(chosen, answers, strict=True):
                texts[i] = tokenizer.decode(answer, skip_special_tokens=True).strip()
    return texts
