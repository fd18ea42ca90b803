"""A training step to be planned, free of where its settings came from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loratory.methods.method import check_choice, check_positive_int

Inputs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape and number format
Sharding = Literal["none", "ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the base comes into memory, for the start-up peak. Bytes."""

    stored: int = 0  # of the weights in their file
    loaded: int = 0  # of the weights once loaded, before a quantiser packs them
    largest: int = 0  # of the largest loaded weight
    copies: float = 0.0  # of the stored weights, that are in memory beside the loaded ones at the same time
    packing: str | None = None  # a quantiser that packs layer by layer once all are loaded
    on_host: bool = False  # all this happens in the host's memory, not the device's


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training step: a base, what is attached to it, a batch, an optimizer, devices.

    build makes the base on the meta device, packed layers included; attach puts onto it what is trained and returns the model to run; inputs gives the shapes
    of a batch of so many rows; loss maps (model, inputs) to a scalar, by default the `loss` of the model's output.
    """

    build: Callable[[], nn.Module]
    attach: Callable[[nn.Module], nn.Module]
    inputs: Callable[[int], Inputs]
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None
    batch: int = 8
    accumulation: int = 1
    checkpointing: bool = False
    optimizer: str = "adamw_torch_fused"
    devices: int = 1
    sharding: Sharding = "none"
    loading: Loading = field(default_factory=Loading)
    settings: Mapping[str, Any] = field(default_factory=dict)  # in words, for tables

    def __post_init__(self) -> None:
        for name in ("batch", "accumulation", "devices"):
            check_positive_int(name, getattr(self, name))
        check_choice("sharding", self.sharding, ("none", "ddp", "fsdp"))
        if self.devices > 1 and self.sharding == "none":
            raise ValueError(f"devices is {self.devices} and sharding is 'none'; it must be ddp (copies) or fsdp (shares)")
