"""A training step to be planned, free of where its settings came from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loratory.methods.fields import check_choice, check_positive_int

Inputs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape and number format
Sharding = Literal["none", "ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training step: a base, what is attached to it, a batch, an optimizer, devices.

    build makes the base on the meta device; pack stores chosen layers of it in fewer bits, in place; attach puts onto it what is
    trained and returns the model to run; inputs gives the shapes of a batch of so many rows; loss maps (model, inputs) to a
    scalar, by default the `loss` of the model's output. stored: the number format of the weights' file; where it is not the one
    that is loaded, both are held at once. file: bytes of a file of packed blocks that is read besides; unpacks: it is first
    written unpacked, in float32. depth: how many equal blocks the base has, and cut: the job with so many, where that can be said.
    """

    build: Callable[[], nn.Module]
    attach: Callable[[nn.Module], nn.Module]
    inputs: Callable[[int], Inputs]
    pack: Callable[[nn.Module], None] | None = None
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None
    stored: torch.dtype | None = None
    file: int = 0
    unpacks: bool = False
    depth: int | None = None
    cut: Callable[[int], "Job"] | None = None
    batch: int = 8
    accumulation: int = 1
    checkpointing: bool = False
    optimizer: str = "adamw_torch_fused"
    on_gpu: bool = True
    devices: int = 1
    sharding: Sharding = "none"
    settings: Mapping[str, Any] = field(default_factory=dict)  # what it was made from, for tables

    def __post_init__(self) -> None:
        for name in ("batch", "accumulation", "devices"):
            check_positive_int(name, getattr(self, name))
        check_choice("sharding", self.sharding, ("none", "ddp", "fsdp"))
        if self.devices > 1 and self.sharding == "none":
            raise ValueError(
                f"devices is {self.devices} and sharding is 'none'; it must be 'ddp' (each device holds a copy) or 'fsdp' (a share)"
            )
