"""Program: plain training loops in two processes, beside the same loop in one. The first process prints what came out as JSON.

python -m tests.processes.loops FOLDER
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import loratory as lt
from loratory.runtime.shards import is_sharded

STORIES = Path(__file__).parents[1] / "models" / "stories260k"
METHODS = {
    "lora": lt.LoRA(rank=4, lr_ratio=4.0),
    "lean": lt.LoRA(rank=4, lr_ratio=4.0),
    "dora": lt.DoRA(rank=4),
    "mos": lt.MoS(rank=4, shards=1, alpha=16),
}
IDS = torch.arange(40).reshape(4, 10) * 7 % 500


def fresh(method: lt.Method, *, lean: bool = False, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    lt.adapt(model, method, seed=1, **options)
    if lean:
        assert lt.lean_loss(model, chunk=4).aside is None
    return model


def shard(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, mine: slice, processes: int) -> list[float]:
    inner = lt.summary(model)  # counts are those of the whole tensors
    optimizer = torch.optim.AdamW(
        lt.param_groups(model, lr=3e-3), eps=1e-4
    )  # a rounding error is no direction to go in
    losses = [float(inner.trained)]
    for _ in range(3):
        loss = model(input_ids=IDS[mine], labels=IDS[mine]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen = loss.detach().clone()
        if processes > 1:
            dist.all_reduce(seen)
        losses.append(seen.item() / processes)
    return losses


def equal_training(folder: Path) -> dict[str, Any]:
    """Losses and trained numbers of one process, DDP and FSDP2, each saved under its name."""
    out: dict[str, Any] = {}
    rank, count = dist.get_rank(), dist.get_world_size()
    piece = slice(rank * 4 // count, (rank + 1) * 4 // count)
    for name, method in METHODS.items():
        options: dict[str, Any] = {"also_train": ["model.norm"]} if name in ("lora", "lean") else {"bias": "none"}
        options["lean"] = name == "lean"
        one = fresh(method, **options)
        out[f"{name} one"] = train(one, slice(0, 4), 1)
        lt.save(one, folder / f"{name} one")
        data_parallel = DistributedDataParallel(fresh(method, **options))
        out[f"{name} ddp"] = train(data_parallel, piece, count)
        lt.save(data_parallel, folder / f"{name} ddp")
        sharded = shard(fresh(method, **options))
        out[f"{name} fsdp"] = train(sharded, piece, count)
        sharded.eval()(input_ids=IDS)  # leaves the root's own tensors gathered
        sharded.save_pretrained(folder / f"{name} fsdp")
        dist.barrier()
    return out


def refusal(act: Callable[[], object]) -> str:
    try:
        act()
    except RuntimeError as e:
        return str(e)
    return "nothing was refused"


def refusals(folder: Path) -> dict[str, str]:
    model = shard(fresh(METHODS["lora"], also_train=["model.norm"]))
    ddp = DistributedDataParallel(fresh(METHODS["lora"]))
    return {
        "merge": refusal(lambda: lt.merge(model)),
        "detach": refusal(lambda: lt.detach(model)),
        "adapt": refusal(lambda: lt.adapt(model, lt.LoRA(rank=2), name="late")),
        "use": refusal(lambda: lt.use(model)),
        "peft": refusal(lambda: lt.export(model, folder / "peft", to="peft")),
        "load into ddp": refusal(lambda: lt.load(ddp, folder / "lora one", name="late", trainable=True)),
        "unreached": refusal(unreached),
    }


class Idle(nn.Module):
    """One of its layers is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def unreached() -> None:
    model = Idle()
    lt.adapt(model, lt.LoRA(rank=2), ["used", "idle"])
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(lt.param_groups(model))
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


def switching() -> dict[str, float]:
    """Largest difference between the sharded and the whole model, whichever adapters are active."""
    models = []
    for sharding in (False, True):
        model = fresh(lt.LoRA(rank=4), name="a")
        lt.adapt(model, lt.DoRA(rank=2), "mlp", name="b", seed=2)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in (p for n, p in model.named_parameters() if n.endswith(".B")):
                p.normal_(std=0.05, generator=generator)
        models.append((shard(model) if sharding else model).eval())
    choices: dict[str, Callable[[Any], None]] = {
        "a": lambda m: lt.use(m, "a"),
        "b": lambda m: lt.use(m, "b"),
        "mixed": lambda m: lt.use(m, "a", "b", mix=[0.3, 0.6]),
        "none": lambda m: lt.use(m),
    }
    out = {}
    with torch.no_grad():
        for name, choose in choices.items():
            for model in models:
                choose(model)
            whole, spread = (model(input_ids=IDS).logits for model in models)
            out[name] = float((whole - spread).abs().max())
    assert is_sharded(models[1])
    assert not is_sharded(models[0])
    return out


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {"losses": equal_training(folder), "refused": refusals(folder), "switched": switching()}
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
