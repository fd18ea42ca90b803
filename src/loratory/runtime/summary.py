"""What is trained: `trained`, `param_groups` and `summary`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from loratory.runtime.layer import Tensors, copies_of, is_ours, layers_of, pools_of
from loratory.runtime.shards import gathers_itself, reshard
from loratory.runtime.state import state_of, unwrap
from loratory.sites.quantized import quantized_sites


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained tensors of the active adapters, under the names that they have in an adapter file."""
    model = unwrap(model)
    reshard(model)
    names = state_of(model).active
    out: dict[str, nn.Parameter] = {}
    for layer_name, layer in layers_of(model).items():
        for name in names:
            if name in layer:
                out |= {
                    _key(names, name, f"layers/{layer_name}/{n}"): p
                    for n, p in layer[name].named_parameters()
                    if p.requires_grad
                }
    pools = pools_of(model)
    for name in names:
        if name in pools:
            out |= {_key(names, name, f"shared/{n}"): p for n, p in pools[name].named_parameters() if p.requires_grad}
    for owner, copies in copies_of(model).items():
        for name in names:
            if name in copies:
                for leaf, p in copies[name].named_parameters():
                    if p.requires_grad and not any(p is q for q in out.values()):
                        out[_key(names, name, f"also_train/{owner}.{leaf}" if owner else f"also_train/{leaf}")] = p
    return out


def _key(names: tuple[str, ...], name: str, key: str) -> str:
    return key if len(names) == 1 else f"{name}/{key}"


def param_groups(model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer, with each method's own rates and without decay where it forbids it.

    One group for each pair of rate and decay: {"params", "lr", "weight_decay", "names"}. Biases and one-dimensional tensors of
    modules trained in full are not decayed, as transformers does it.
    """
    held: list[Tensors] = [adapter for layer in layers_of(unwrap(model)).values() for adapter in layer.adapters()]
    held += pools_of(unwrap(model)).values()
    tags = {id(getattr(each, n)): tag for each in held for n, tag in each.tags.items()}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, p in trained(model).items():
        tag = tags.get(id(p))
        decay = tag.decay if tag is not None else p.dim() > 1
        rate = lr * (tag.lr if tag is not None else 1.0)
        key = (rate, weight_decay if decay else 0.0)
        group = groups.setdefault(key, {"params": [], "lr": key[0], "weight_decay": key[1], "names": []})
        group["params"].append(p)
        group["names"].append(name)
    return list(groups.values())


class SummaryRow(NamedTuple):
    layer: str
    method: str
    shape: tuple[int, ...]
    trained: int
    bytes: int
    share: float  # of the model's own parameters


@dataclass(frozen=True)
class Summary:
    """What an adapter trains, layer by layer."""

    rows: list[SummaryRow]
    trained: int
    total: int  # the model's own parameters
    bytes: int  # of the trained tensors
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        return self.trained / self.total if self.total else 0.0

    def __str__(self) -> str:
        head = ("layer", "method", "shape", "trained", "bytes", "share")
        body = [
            (
                r.layer,
                r.method,
                " x ".join(map(str, r.shape)),
                f"{r.trained:,}",
                f"{r.bytes:,}",
                f"{100 * r.share:.3f} %",
            )
            for r in _grouped(self.rows)
        ]
        widths = [max(len(row[i]) for row in [head, *body]) for i in range(6)]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in [head, *body]
        ]
        last = (
            f"trained {self.trained:,} of {self.total:,} numbers ({100 * self.share:.3f} %), {self.bytes / 1e6:.2f} MB"
        )
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], last, *self.notes])


def _grouped(rows: list[SummaryRow]) -> list[SummaryRow]:
    """Rows of repeated blocks folded into one: numbers in the name become *."""
    folded: dict[tuple[str, str, tuple[int, ...]], list[SummaryRow]] = {}
    for row in rows:
        name = ".".join("*" if part.isdigit() else part for part in row.layer.split("."))
        folded.setdefault((name, row.method, row.shape), []).append(row)
    return [
        SummaryRow(
            f"{name} ({len(each)})" if len(each) > 1 else each[0].layer,
            method,
            shape,
            sum(r.trained for r in each),
            sum(r.bytes for r in each),
            sum(r.share for r in each),
        )
        for (name, method, shape), each in folded.items()
    ]


def summary(model: nn.Module) -> Summary:
    """Layer, method, trained numbers, bytes and share of the total, for the active adapters."""
    model = unwrap(model)
    state = state_of(model)
    total = count_base(model)
    layers, rows = layers_of(model), []
    sizes: dict[str, list[int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for key, p in trained(model).items():
        name = _place(key)
        shapes[name] = tuple(p.shape)
        size = sizes.setdefault(name, [0, 0])
        size[0] += p.numel()
        size[1] += p.numel() * p.element_size()
    for name, (count, size_bytes) in sizes.items():
        method, shape = "in full", shapes[name]
        if name.startswith("shared/"):
            method = "+".join(type(state.adaptations[n].method).__name__ for n in state.active if n in pools_of(model))
        elif name in layers:
            method, shape = "+".join(_label(t) for t in layers[name].active), layers[name].site.shape
        rows.append(SummaryRow(name, method, shape, count, size_bytes, count / total))
    notes = [note for name in state.active for note in state.adaptations[name].notes]
    for name in state.active:
        figures = {n: _figures(layer[name]) for n, layer in layers.items() if name in layer}
        shown = {what for own in figures.values() for what, figure in own.items() if figure}
        notes += told({n: {what: own[what] for what in own if what in shown} for n, own in figures.items()})
    return Summary(rows, sum(r.trained for r in rows), total, sum(r.bytes for r in rows), tuple(notes))


def told(figures: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A sentence for each figure of the layers that have it."""
    found: dict[str, dict[str, float]] = {}
    for layer, own in figures.items():
        for what, figure in own.items():
            found.setdefault(what, {})[layer] = figure
    notes = []
    for what, each in found.items():
        most = max(each, key=each.__getitem__)
        notes.append(
            f"{what}: {sum(each.values()) / len(each):.3g} on average, at most {each[most]:.3g} (layer '{most}')"
        )
    return notes


def _figures(t: Any) -> dict[str, float]:
    """A layer's own figures; none of numbers that are not here (the meta device, shards)."""
    if gathers_itself(t) or any(p.is_meta for p in t.parameters()):
        return {}
    with torch.no_grad():
        return dict(t.method.figures(t))


def _place(key: str) -> str:
    """The layer, the shared tensor (`shared/NAME`) or the module trained in full that a trained tensor belongs to."""
    if "layers/" in key:
        return key.split("layers/", 1)[1].rpartition("/")[0]
    return key.split("also_train/", 1)[1] if "also_train/" in key else "shared/" + key.split("shared/", 1)[1]


def _label(adapter: Any) -> str:
    rank = getattr(adapter, "A", None)
    return type(adapter.method).__name__ + (f" r={rank.shape[-2]}" if rank is not None and rank.dim() >= 2 else "")


def count_base(model: nn.Module) -> int:
    """Numbers of the model's own parameters; of a quantised weight the numbers it stands for, not its codes."""
    quantized = quantized_sites(model)
    seen: dict[int, int] = {}
    for name, p in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if is_ours(name):
            continue
        if owner in quantized and leaf != "bias":
            site = quantized[owner]
            seen[site.pieces()[0].data_ptr()] = torch.Size(site.shape).numel()
        else:
            seen[id(p)] = p.numel()
    return sum(seen.values())
