"""What an adapter folder holds, as one printable record."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Inspection:
    """What an adapter folder holds, read without its base."""

    folder: str
    format: str
    method: str
    hyperparameters: dict[str, Any]
    layers: dict[str, dict[str, Any]]  # name -> settings that differ there
    tensors: dict[str, tuple[tuple[int, ...], str]]
    also_train: list[str]
    base: dict[str, Any]
    training: dict[str, Any] | None
    bytes: int

    @property
    def numbers(self) -> int:
        return sum(int(torch.Size(shape).numel()) for shape, _ in self.tensors.values())

    def __str__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.hyperparameters.items())
        special = {k: v for k, v in self.layers.items() if v}
        lines = [
            f"{self.folder}: {self.format}, {self.bytes / 1e6:.2f} MB",
            f"method   {self.method} ({settings})",
            f"layers   {len(self.layers)}: {', '.join(list(self.layers)[:3])}{', ...' if len(self.layers) > 3 else ''}",
            *(f"         {name}: {over}" for name, over in list(special.items())[:5]),
            f"tensors  {len(self.tensors)}, {self.numbers:,} numbers",
            *(
                [f"in full  {', '.join(self.also_train[:5])}{', ...' if len(self.also_train) > 5 else ''}"]
                if self.also_train
                else []
            ),
            f"base     {self.base.get('name') or 'unnamed'} ({self.base.get('class') or 'class not recorded'}, {self.base.get('dtype') or 'precision not recorded'})",
        ]
        if self.training:
            lines.append(
                "trained  "
                + ", ".join(f"{k}={v}" for k, v in self.training.items() if isinstance(v, str | int | float))
            )
        return "\n".join(lines)
