"""Methods that act during training: `drive` calls them around each step of an optimizer, in plain loops and under Trainer."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from loratory.methods.method import Run
from loratory.runtime.layer import layers_of
from loratory.runtime.shards import own_piece
from loratory.runtime.state import state_of, unwrap

_driven: "WeakKeyDictionary[nn.Module, Drive]" = WeakKeyDictionary()


class Drive:
    """The hooks of one run. `state` and `restore` are for checkpoints; `close` ends it."""

    def __init__(self, optimizer: torch.optim.Optimizer, runs: dict[str, tuple[Any, Run]]) -> None:
        self.runs = runs
        self.generators: dict[str, torch.Tensor] = {}  # as they were before the coming step's draws
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []  # held parts of tensors, and what they were
        self.handles = [
            optimizer.register_step_pre_hook(self._before_update),
            optimizer.register_step_post_hook(self._after_update),
        ]
        self.begin()

    def begin(self) -> None:
        """Prepare the coming step."""
        for name, (method, run) in self.runs.items():
            run.resting.clear()
            run.held.clear()
            self.generators[name] = run.generator.get_state()
            with torch.no_grad():
                method.before_step(run)

    def state(self) -> dict[str, Any]:
        """Steps done and generators, as JSON values; tensors lie in the adapter."""
        return {
            name: {"step": run.step, "generator": bytes(self.generators[name].tolist()).hex()}
            for name, (_, run) in self.runs.items()
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state, after the adapter's tensors have been restored."""
        for name, kept in state.items():
            _, run = self.runs[name]
            run.step = kept["step"]
            run.kept.clear()
            run.generator.set_state(torch.tensor(list(bytes.fromhex(kept["generator"])), dtype=torch.uint8))
        self.begin()

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for _, run in self.runs.values():
            for tensor in run.resting:
                tensor.grad = None  # an optimizer passes over a tensor without one, its moments and decay included
            parts = [own_piece(tensor.detach())[..., :columns] for tensor, columns in run.held]
            self.before += [(part, part.clone()) for part in parts]

    def _after_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for part, was in self.before:
            part.copy_(was)
        self.before.clear()
        for method, run in self.runs.values():
            with torch.no_grad():
                method.after_step(run)
            run.step += 1
        self.begin()


def drive(
    model: nn.Module,
    optimizer: Any,
    steps: int | None = None,
    epoch_steps: int | None = None,
    *,
    step: int = 0,
    seed: int = 0,
    reschedule: bool = False,
) -> Drive:
    """Let the active adapters' methods act at each step of this optimizer; call it once, before the loop.

    steps: optimizer steps of the whole run; epoch_steps: of one pass over the data; step: those already done, of a run that goes on;
    seed: of the methods' own draws; reschedule=True: go on under another schedule than an earlier run began with. Nothing happens for methods that do not act during training. A second call replaces the first.
    Raises ValueError for numbers below 1, or an optimizer that steps none of the adapter's tensors.
    """
    model, optimizer = unwrap(model), getattr(optimizer, "optimizer", optimizer)
    for field, value in (("steps", steps), ("epoch_steps", epoch_steps)):
        if value is not None and value < 1:
            raise ValueError(f"{field} is {value}; it must be at least 1, or None where it is not known")
    if step < 0 or (steps is not None and step > steps):
        raise ValueError(f"step is {step}; it must lie between 0 and steps ({steps})")
    state, stepped = state_of(model), {id(p) for group in optimizer.param_groups for p in group["params"]}
    runs: dict[str, tuple[Any, Run]] = {}
    for name in state.active:
        method = state.adaptations[name].method
        if not method.acts_in_training:
            continue
        held: dict[str, Any] = {layer_name: layer for layer_name, layer in layers_of(model).items() if name in layer}
        layers = {layer_name: layer[name] for layer_name, layer in held.items()}
        if not any(id(p) in stepped for t in layers.values() for p in t.trained().values()):
            raise ValueError(
                f"the optimizer steps none of adapter '{name}''s tensors; build it from loratory.param_groups(model) first"
            )
        sites = {layer_name: layer.site for layer_name, layer in held.items()}
        generator = torch.Generator().manual_seed(seed)
        runs[name] = method, Run(layers, sites, optimizer, generator, steps, epoch_steps, step, reschedule)
    if model in _driven:
        _driven.pop(model).close()
    _driven[model] = Drive(optimizer, runs)
    return _driven[model]


def is_driven(model: nn.Module) -> bool:
    """Whether `drive` was called for this model."""
    return unwrap(model) in _driven
