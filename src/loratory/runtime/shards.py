"""Several processes: tensors that fully_shard or DeepSpeed's ZeRO-3 has spread over them, and which process writes.

A sharded tensor is gathered by all processes together, so what gathers (saving, loading into a trained model) must be called
by all of them. Nothing here imports torch.distributed's sharding; it is there already where a tensor is sharded.
"""

import sys
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def processes() -> int:
    """How many processes train together; 1 without torch.distributed."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def is_main_process() -> bool:
    """Whether this process writes the files."""
    return processes() == 1 or torch.distributed.get_rank() == 0


def wait() -> None:
    """Wait until every process is here."""
    if processes() > 1:
        torch.distributed.barrier()


def any_process(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether the flag is set on any process; every process must ask."""
    if processes() == 1:
        return flag
    found = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)


def mean_of_processes(value: Tensor) -> float:
    """The mean of a number over the processes; every process must ask."""
    total = value.detach().clone()
    if processes() > 1:
        torch.distributed.all_reduce(total)
    return float(total) / processes()


def is_sharded(model: nn.Module) -> bool:
    """Whether fully_shard or ZeRO-3 has spread this model, or a part of it, over the processes."""
    return any(True for _ in _sharded_modules(model)) or by_zero3(model)


def gathers_itself(module: nn.Module) -> bool:
    """Whether a module's own parameters are whole only while the module itself runs."""
    own = [p for p in module._parameters.values() if p is not None]
    return is_sharding(type(module)) or any("ds_id" in p.__dict__ or spread(p) for p in own)  # type: ignore[arg-type]


def by_zero3(model: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 has spread this model, or a part of it."""
    return "deepspeed" in sys.modules and any(hasattr(p, "ds_id") for p in model.parameters())


def spread(tensor: Tensor) -> bool:
    """Whether a tensor lies in pieces on several processes (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the whole tensor; under DeepSpeed's ZeRO-3 a parameter shows none of its own."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def whole(tensor: Tensor, key: str = "", state_dict: Mapping[str, Tensor] | None = None) -> Tensor:
    """The whole tensor, on every process, all of which must ask for it; or, without the others, from a gathered state_dict."""
    zero3 = hasattr(tensor, "ds_id")  # DeepSpeed's
    if zero3 and state_dict is None:
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    if not zero3 and not spread(tensor):
        return tensor
    if state_dict is None:
        return tensor.full_tensor()  # type: ignore[attr-defined]
    if key not in state_dict:
        gather = " (DeepSpeed gives it where stage3_gather_16bit_weights_on_model_save is true)" if zero3 else ""
        raise ValueError(
            f"the state_dict given to save a sharded model lacks '{key}'; give the whole one (accelerator.get_state_dict(model)){gather}, or none"
        )
    return whole(state_dict[key])


def own_piece(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this process."""
    return tensor.to_local() if spread(tensor) else tensor  # type: ignore[attr-defined]


def spread_like(target: Any, value: Tensor) -> Tensor:
    """`value`, which every process holds whole, spread as `target` is (`value` itself where that is not)."""
    if not spread(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    whole = value.to(target.device, target.dtype)
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)


def class_name(model: nn.Module) -> str:
    """The name of a model's class, as it was before fully_shard."""
    return next(cls.__name__ for cls in type(model).__mro__ if not is_sharding(cls))


def reshard(model: nn.Module) -> None:
    """Let every sharded module hold its pieces again, which a forward pass may have left gathered."""
    for module in _sharded_modules(model):
        module.reshard()  # it costs nothing where they hold them


def refuse_sharded(model: nn.Module, what: str, way_out: str) -> None:
    """Raises RuntimeError for what a sharded model cannot do."""
    if is_sharded(model):
        raise RuntimeError(
            f"the model is sharded by {'ZeRO-3' if by_zero3(model) else 'fully_shard'}, so {what}; {way_out}"
        )


def _sharded_modules(model: nn.Module) -> Iterator[Any]:
    modules: Iterator[Any] = model.modules()
    return (m for m in modules if is_sharding(type(m)))  # type: ignore[arg-type]


@cache
def is_sharding(cls: Any) -> bool:
    """Whether fully_shard has made this class."""
    return any(each.__name__ == "FSDPModule" for each in cls.__mro__)
