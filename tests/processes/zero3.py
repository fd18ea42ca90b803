"""Program: a plain loop under DeepSpeed's ZeRO-3 in two processes, beside the same loop in one.

python -m tests.processes.zero3 FOLDER
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import loratory as lt
from loratory.runtime.shards import is_sharded
from tests.processes.loops import IDS, METHODS, fresh, refusal, train

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "gradient_clipping": 0.0,  # DeepSpeed clips at 1 by itself
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def train_sharded(model: Any, mine: slice) -> tuple[Any, list[float]]:
    groups = lt.param_groups(model, lr=3e-3)
    losses = [float(lt.summary(model).trained)]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, eps=1e-4), config=CONFIG)
    for _ in range(3):
        loss = engine(input_ids=IDS[mine], labels=IDS[mine]).loss
        engine.backward(loss)
        engine.step()
        seen = loss.detach().clone()
        dist.all_reduce(seen)
        losses.append(seen.item() / dist.get_world_size())
    return engine, losses


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    rank, out = dist.get_rank(), {}
    for name, method in METHODS.items():
        one = fresh(method)
        out[f"{name} one"] = train(one, slice(0, 4), 1)
        lt.save(one, folder / f"{name} one")
        engine, out[f"{name} zero3"] = train_sharded(fresh(method), slice(2 * rank, 2 * rank + 2))
        assert is_sharded(engine.module)
        out["merge"] = refusal(lambda engine=engine: lt.merge(engine))
        lt.save(engine, folder / f"{name} zero3")
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(out))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another one still speaks with it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # DeepSpeed's threads are not joined at the interpreter's end, which then sometimes aborts
