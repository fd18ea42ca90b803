"""What a run trains: an adapter on its model, ours or PEFT's, behind one interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import loratory as lt
from loratory.runtime.layer import fill_copies, layers_of, pools_of
from loratory.runtime.penalty import has_penalty, penalty
from loratory.runtime.shards import spread_like
from loratory.runtime.state import one_name, unwrap
from loratory.store.identity import check_identity
from loratory.store.native import read


class Attached(Protocol):
    """An adapter and the model that carries it."""

    model: Any

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors under stable names."""

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for a torch optimizer."""

    def summary(self) -> Any:
        """What is trained: printable, with `trained`, `total` and `notes`."""

    def penalty(self) -> Tensor | None:
        """What the method adds to the training loss; None: nothing."""

    def after_step(self, step: int) -> None:
        """Called after each optimizer step (the first is 1), while its gradients are still there."""

    def write(self, folder: Path | None) -> None:
        """Everything `restore` needs, into a checkpoint's folder. A process without one only gives its part of what is gathered."""

    def restore(self, folder: Path) -> None:
        """Put a checkpoint's values back."""

    def save(self, folder: Path, training: dict[str, Any]) -> None:
        """The finished adapter with its training record, as one atomic folder."""


class Own:
    """One of Loratory's methods, attached by `lt.adapt`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.penalised = has_penalty(model)  # a run does not switch adapters

    def trained(self) -> dict[str, nn.Parameter]:
        return lt.trained(self.model)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return lt.param_groups(self.model, lr=lr, weight_decay=weight_decay)

    def summary(self) -> Any:
        return lt.summary(self.model)

    def penalty(self) -> Tensor | None:
        return penalty(self.model) if self.penalised else None

    def after_step(self, step: int) -> None:
        pass

    def write(self, folder: Path | None) -> None:
        lt.save(self.model, folder or Path(), is_main_process=folder is not None)

    def restore(self, folder: Path) -> None:
        record, tensors = read(folder)
        check_identity(self.model, record["base"], record["also_train"], other_precision=False)
        name = one_name(self.model, None)
        held: dict[str, Any] = {
            f"layers/{layer_name}": layer[name] for layer_name, layer in layers_of(self.model).items()
        }
        if name in pools_of(unwrap(self.model)):
            held["shared"] = pools_of(unwrap(self.model))[name]
        with torch.no_grad():
            for place, each in held.items():
                for key, tensor in each.tensors().items():
                    if not each.tags[key].rebuilt:  # this run has made it anew
                        tensor.copy_(spread_like(tensor, tensors.pop(f"{place}/{key}")))
        fill_copies(self.model, name, {key.removeprefix("also_train/"): tensor for key, tensor in tensors.items()})

    def save(self, folder: Path, training: dict[str, Any]) -> None:
        lt.save(self.model, folder, training=training)
