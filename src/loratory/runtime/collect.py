"""Figures of the frozen weights over batches, for methods that start from data: `collect`.

They are summed in float32 on the CPU, weight by weight while the backward pass runs, and never hold more than a byte budget: layers
that do not fit together are taken in passes over the same batches with the same generators, and each finished pass goes to files.
"""

import random
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from loratory.methods.method import Method
from loratory.runtime.mode import in_mode
from loratory.runtime.progress import shown
from loratory.runtime.route import disabled
from loratory.runtime.shards import processes, refuse_sharded
from loratory.runtime.state import is_adapted, refuse_in_rows, state_of, unwrap
from loratory.runtime.ties import tied_places
from loratory.runtime.where import Where, named_parameters, select
from loratory.sites import Site, find_site

Loss = Callable[[nn.Module, Any], Tensor]

FIGURES: dict[
    str, Callable[[Tensor, int], Tensor]
] = {  # of a batch's gradient and its number of samples: what is summed
    "gradient": lambda gradient, samples: gradient / samples,
    "absolute_gradient": lambda gradient, samples: (gradient / samples).abs(),
}
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Folder:
    """A temporary folder that goes when this object does."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="loratory-collected-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True)
class Collected:
    """What was gathered of each layer. Give it to `adapt` as seen=; a method finds its part as `site.seen`."""

    what: tuple[str, ...]
    samples: int
    passes: int  # over the batches
    layers: dict[str, dict[str, Tensor] | Path]  # a file where all together would not fit the budget
    shapes: dict[str, tuple[int, ...]]
    folder: "Folder | None" = field(default=None, repr=False)

    def of(self, layer: str) -> SimpleNamespace:
        """The figures of one layer, (*stack, out, in) each; those in files are read now."""
        kept = self.layers[layer]
        if isinstance(kept, Path):
            from safetensors.torch import load_file

            kept = load_file(kept)
        return SimpleNamespace(**kept)


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    what: str | Iterable[str] = "gradient",
    *,
    where: Where | None = None,
    parameters: Iterable[str] | Mapping[str, str] | None = None,
    exclude: Where | None = None,
    blocks: int | Iterable[int] | None = None,
    samples: int | None = None,
    budget: int | str = "2GB",
    over_processes: bool = True,
) -> Collected:
    """Gather figures of the frozen weights of the layers that where, parameters, exclude and blocks choose (as in `adapt`) over batches.

    what: "gradient", the sum over batches of the gradient of loss(model, batch) / (rows of the batch); "absolute_gradient", that of
    its entries' absolute values.
    loss: of the model and a batch; default: the field `loss` of what the model returns for it.
    samples: stop after so many rows; the last batch is cut to fit. budget: bytes, or text such as "500MB".
    Runs the base in training mode (dropout on, adapters off). Flags, gradients, generators, buffers of norms and the model's mode are
    afterwards as before. over_processes: with several processes each gives its own batches, and the sums are added up.
    Raises ValueError for a layer that is quantised, shares its weight, gets no gradient, or is larger than the budget.
    """
    model = unwrap(model)
    names = (what,) if isinstance(what, str) else tuple(what)
    if unknown := sorted(set(names) - set(FIGURES)) or ([] if names else [""]):
        raise ValueError(f"what names '{unknown[0]}'; it can be {', '.join(FIGURES)}")
    if samples is not None and samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1, or None for all rows")
    refuse_in_rows(model, "collecting")
    refuse_sharded(model, "no process holds a whole weight", "collect before fully_shard")
    if is_adapted(model) and state_of(model).merged:
        raise RuntimeError("the model is merged; call loratory.unmerge(model) before collecting figures of its base")
    limit = read_bytes(budget)
    with disabled(model) if is_adapted(model) else nullcontext():
        sites = _sites(model, where, parameters, exclude, blocks)
        groups = _groups(sites, len(names), limit)
        source = _first(batches, samples) if len(groups) > 1 and isinstance(batches, Iterator) else batches
        folder = Folder() if len(groups) > 1 else None
        layers: dict[str, dict[str, Tensor] | Path] = {}
        with _as_before(model, source) as again:
            for group in shown("collecting", groups):
                again()
                sums, rows = _pass(
                    model, {name: sites[name] for name in group}, source, loss or _own_loss, names, samples
                )
                for name in group:
                    file = None if folder is None else folder.path / str(len(layers))
                    layers[name] = _finished(sites[name], sums.pop(name), over_processes, file)
    shapes = {name: tuple(site.shape) for name, site in sites.items()}
    return Collected(names, rows, len(groups), layers, shapes, folder)


def seen_by(site: Site, method: Method, seen: Collected | None) -> SimpleNamespace | None:
    """What a method finds of a layer; on the meta device the shapes are enough."""
    if not method.needs:
        return None
    kind, wanted = type(method).__name__, ", ".join(sorted(method.needs))
    if seen is None and site.device.type == "meta":
        return SimpleNamespace(**{what: torch.empty(site.shape, device="meta") for what in method.needs})
    if seen is None:
        raise ValueError(
            f"layer '{site.name}': {kind} needs training batches for its start ({wanted}); pass "
            f"seen=loratory.collect(model, batches, what={sorted(method.needs)!r}), or leave the layer out with exclude="
        )
    if lacking := sorted(method.needs - set(seen.what)):
        raise ValueError(
            f"layer '{site.name}': {kind} needs the {lacking[0]}, but only {', '.join(seen.what)} was collected; add it to what="
        )
    if site.name not in seen.layers or seen.shapes[site.name] != tuple(site.shape):
        raise ValueError(
            f"layer '{site.name}' was not collected by seen=, so {kind} cannot start there; collect it with the same where=, or leave the "
            "layer out with exclude="
        )
    return seen.of(site.name)


def read_bytes(budget: int | str) -> int:
    """A number of bytes, or a text such as "2GB"."""
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*([\d.]+)\s*([KMG]?I?B)\s*", budget.upper())
        if not match or match[2] == "IB":
            raise ValueError(f"budget is {budget!r}; give bytes, or a text such as '500MB' or '2GB'")
        return int(float(match[1]) * UNITS[match[2]])
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f"budget is {budget!r}; give a positive number of bytes, or a text such as '2GB'")
    return budget


def _sites(
    model: nn.Module,
    where: Where | None,
    parameters: Iterable[str] | Mapping[str, str] | None,
    exclude: Where | None,
    blocks: int | Iterable[int] | None,
) -> dict[str, Site]:
    named = named_parameters(model, parameters)
    chosen = select(model, where or "all-linear", exclude=exclude, blocks=blocks) if where or not named else {}
    sites = {name: find_site(name, module) for name, module in (chosen | named).items()}
    shared = {name: names for names in tied_places(model).values() for name in names}
    for name, site in sites.items():
        if site.rounds:
            raise ValueError(
                f"layer '{name}' is quantised, and a method that starts from gradients needs those of the full weight; collect before "
                "loratory.quantize, load the base without quantisation, use a method without data (LoRA-XS), or leave the layer out with exclude="
            )
        if site.weight_name in shared:
            other = next(n for n in shared[site.weight_name] if n != site.weight_name)
            raise ValueError(
                f"layer '{name}' shares its weight with '{other}', so its gradient would mix both; leave it out with exclude="
            )
    return sites


def _groups(sites: Mapping[str, Site], figures: int, limit: int) -> list[list[str]]:
    """Layers in passes: their sums and the one gradient that is being added fit the budget together."""
    groups: list[list[str]] = []
    sums = largest = 0
    for name, site in sites.items():
        numbers = torch.Size(site.shape).numel()
        own, gradient = _wide(site.dtype).itemsize * numbers * figures, site.weight.element_size() * numbers
        if own + gradient > limit:
            raise ValueError(
                f"layer '{name}' needs {own + gradient:,} bytes for what is collected of it, but the budget is {limit:,}; give a larger "
                "budget=, or leave the layer out with exclude="
            )
        if not groups or sums + own + max(largest, gradient) > limit:
            groups.append([])
            sums = largest = 0
        groups[-1].append(name)
        sums, largest = sums + own, max(largest, gradient)
    return groups


def _pass(
    model: nn.Module,
    sites: Mapping[str, Site],
    batches: Iterable[Any],
    loss: Loss,
    names: Sequence[str],
    samples: int | None,
) -> tuple[dict[str, dict[str, Tensor]], int]:
    """The sums of some layers, each in the shape of its parameter, and how many rows they are of."""
    sums = {n: {f: torch.zeros(s.weight.shape, dtype=_wide(s.dtype)) for f in names} for n, s in sites.items()}
    reached: set[str] = set()
    size = 0

    def adding(name: str) -> Callable[[Tensor], None]:
        def add(p: Tensor) -> None:
            assert p.grad is not None
            gradient = (p.grad.to_dense() if p.grad.is_sparse else p.grad).to("cpu", _wide(p.dtype))
            p.grad = None
            reached.add(name)
            for figure, total in sums[name].items():
                total += FIGURES[figure](gradient, size)

        return add

    handles, seen = [], 0
    try:
        for name, site in sites.items():
            site.weight.requires_grad_(True)
            handles.append(site.weight.register_post_accumulate_grad_hook(adding(name)))
        for batch, size in _cut(batches, samples):
            with torch.enable_grad():
                value = loss(model, batch)
                if not bool(torch.isfinite(value)):
                    raise ValueError(
                        f"the loss of rows {seen + 1} to {seen + size} is {value.item()}; look at these rows"
                    )
                value.backward()
            seen += size
    finally:
        for handle in handles:
            handle.remove()
        for site in sites.values():
            site.weight.requires_grad_(False)
    if not seen:
        raise ValueError("batches holds no rows, so nothing can be collected; give at least one")
    for name, found in sums.items():
        if name not in reached:
            raise ValueError(
                f"layer '{name}' received no gradient; is it frozen, unused or detached? leave it out with exclude="
            )
        if not all(bool(torch.isfinite(total).all()) for total in found.values()):
            raise ValueError(
                f"the gradient of layer '{name}' is nan or inf; load the base in float32, or look at the rows"
            )
    return sums, seen


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    out = model(**batch) if isinstance(batch, Mapping) else model(batch)
    value = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"the model returned no loss ({type(out).__name__}); put labels into the batches, or give loss=, a function of model and batch"
        )
    return value


def _cut(batches: Iterable[Any], samples: int | None) -> Iterator[tuple[Any, int]]:
    """Batches with their numbers of rows, until there are so many rows; the last one is cut."""
    left = samples
    for batch in batches:
        size = _rows(batch)
        if left is not None and size > left:
            batch, size = _head(batch, size, left), left
        if size:
            yield batch, size
        if left is not None:
            left -= size
            if not left:
                return


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for key in sorted(batch, key=lambda key: key not in ("input_ids", "pixel_values", "inputs_embeds")):
            yield from _tensors(batch[key])
    elif isinstance(batch, list | tuple):
        for each in batch:
            yield from _tensors(each)


def _rows(batch: Any) -> int:
    first = next((t for t in _tensors(batch) if t.dim()), None)
    if first is None:
        raise TypeError(f"a batch is a {type(batch).__name__} without a tensor, so its rows cannot be counted")
    return first.shape[0]


def _head(batch: Any, size: int, count: int) -> Any:
    """The first rows of a batch: of each tensor whose first dimension is the batch."""
    if isinstance(batch, Tensor):
        return batch[:count] if batch.dim() and batch.shape[0] == size else batch
    if isinstance(batch, Mapping):
        return {key: _head(each, size, count) for key, each in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_head(each, size, count) for each in batch)
    return batch


def _first(batches: Iterator[Any], samples: int | None) -> list[Any]:
    """What is needed of batches that can be read only once."""
    return [batch for batch, _ in _cut(batches, samples)]


def _finished(site: Site, sums: dict[str, Tensor], over_processes: bool, file: Path | None) -> dict[str, Tensor] | Path:
    """The sums of one layer as matrices, in a file where there is one for them."""
    if over_processes and processes() > 1:
        for total in sums.values():
            torch.distributed.all_reduce(total)
    matrices = {figure: site.as_matrix(total).contiguous() for figure, total in sums.items()}
    if file is None:
        return matrices
    from safetensors.torch import save_file

    save_file(matrices, file)
    return file


@contextmanager
def _as_before(model: nn.Module, batches: Any) -> Iterator[Callable[[], None]]:
    """Flags, gradients, mode, buffers of norms and generators come back; gives what sets buffers and generators for one more pass."""
    flags = {p: p.requires_grad for p in model.parameters()}
    gradients = {p: p.grad for p in flags if p.grad is not None}
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    buffers = {buffer: buffer.clone() for m in norms for buffer in m.buffers(recurse=False)}
    restore = _generators(batches)

    def again() -> None:
        restore()
        for buffer, value in buffers.items():
            buffer.copy_(value)

    for p in flags:
        p.requires_grad_(False)
        p.grad = None
    try:
        with in_mode(model, training=True):
            yield again
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
            p.grad = gradients.get(p)
        again()


def _generators(batches: Any) -> Callable[[], None]:
    """What puts python's, numpy's and torch's generators, and a data loader's own, back to where they are now."""
    python, cpu = random.getstate(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy = sys.modules["numpy"].random if "numpy" in sys.modules else None
    kept = None if numpy is None else numpy.get_state()
    inner = getattr(getattr(batches, "batch_sampler", None), "sampler", None)
    owners = (batches, getattr(batches, "sampler", None), inner)
    found = [g for g in (getattr(owner, "generator", None) for owner in owners) if isinstance(g, torch.Generator)]
    own = [(g, g.get_state()) for g in found]

    def restore() -> None:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        if numpy is not None:
            numpy.set_state(kept)
        for g, state in own:
            g.set_state(state)

    return restore
