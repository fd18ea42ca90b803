"""Several examples in one row: no padding, and nothing of one example in another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loratory.runtime.mode import in_mode
from loratory.tasks.task import IGNORED

PROBE = (5, 3, 7)  # lengths of the examples that tell whether a model keeps them apart


@dataclass(frozen=True)
class PackBatch:
    """Collator: the batch's examples one after the other in one row, their positions from 0 each.

    input_ids, labels, position_ids: (1, tokens of all examples). There is no attention mask: transformers makes the block-diagonal one
    from the positions, and does so only without a cache. No example's first token is predicted from the one before it.
    """

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for example in examples:
            row["input_ids"] += example["input_ids"]
            row["labels"] += [IGNORED, *example["labels"][1:]]
            row["position_ids"] += range(len(example["input_ids"]))
        return {key: torch.tensor([values]) for key, values in row.items()} | {"use_cache": False}


def check_packing(model: Any) -> None:
    """Raises ValueError for a model that lets the examples of a row see each other: logits of packed examples must be those alone."""
    tokens = model.get_input_embeddings().weight
    if tokens.is_meta:
        return
    starts = range(1, 1 + len(PROBE))
    examples = [
        {"input_ids": [(start + 7 * i) % tokens.shape[0] for i in range(length)], "labels": [0] * length}
        for start, length in zip(starts, PROBE, strict=True)
    ]
    try:
        with in_mode(model, training=False), torch.no_grad():
            packed = PackBatch()(examples)
            packed.pop("labels")
            together = model(
                **{k: v.to(tokens.device) if isinstance(v, Tensor) else v for k, v in packed.items()}
            ).logits[0]
            alone = torch.cat(
                [
                    model(input_ids=torch.tensor([e["input_ids"]], device=tokens.device), use_cache=False).logits[0]
                    for e in examples
                ]
            )
    except TypeError as error:
        raise ValueError(
            f"packing needs a model that takes position_ids, and {type(model).__name__} does not ({error}); leave packing out"
        ) from None
    off = float((together - alone).abs().max() / alone.abs().max())
    if not off < (1e-4 if alone.dtype == torch.float32 and tokens.dtype == torch.float32 else 3e-2):
        raise ValueError(
            f"packing: {type(model).__name__} lets examples of one row see each other (its logits change by {off:.2g} of their range); "
            "leave packing out; train_sampling_strategy group_by_length pads less too"
        )
