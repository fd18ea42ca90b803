"""Claims that are checked by training a small network: handwritten digits that a frozen network learned upright, and now come turned.

The network is residual: y = head(h_n), h_i = h_(i-1) + relu(W_i h_(i-1) + b_i), h_0 = embed(x), with square W_i; it is trained once
on upright digits. Methods adapt the blocks alone to the digits turned by 90 degrees, all with AdamW at a constant rate and no decay,
over the same batches. A method's rate is the one with the best mean on dev; where that is the edge of the grid, rates beyond it are
tried too. Test images are scored at that rate alone.
Data: scikit-learn's digits (1,797 images of 8 x 8), which its package holds.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import loratory as lt
from loratory.catalogue.difference import mean_difference
from loratory.compare.choice import beyond
from loratory.compare.statistics import Table
from loratory.methods.registry import method_class

UPRIGHT, DEV = 1000, 150  # images for pretraining, and turned ones to choose rates on
MOST_SAMPLES = 300  # turned images that can be trained on; the 347 after them are the test
BATCH = 50
EXTENSIONS = 4  # rates tried beyond an edge
PRETRAINING = {"steps": 1500, "rate": 2e-3}
MEASURES = ("percent of loss", "points of accuracy")


class Network(nn.Module):
    """The residual network; blocks are its square layers."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Linear(64, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = h + torch.relu(block(h))
        return self.head(h)


class Images(NamedTuple):
    x: Tensor  # (n, 64), between 0 and 1
    y: Tensor  # (n)

    def rows(self, chosen: Any) -> Images:
        return Images(self.x[chosen], self.y[chosen])


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all methods of a claim have in common. Raises ValueError for more samples than there are."""

    width: int = 128
    blocks: int = 4
    samples: int = 300  # turned images to train on, at most MOST_SAMPLES
    steps: int = 200
    seeds: int = 5

    def __post_init__(self) -> None:
        if not BATCH <= self.samples <= MOST_SAMPLES:
            raise ValueError(f"samples is {self.samples}; it must lie between {BATCH} and {MOST_SAMPLES}")


class Learned(NamedTuple):
    dev: Table  # seeds x images: loss
    test: Table
    right: Table  # seeds x test images: 1 where the digit was told
    numbers: int  # that were trained


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order: another number of threads rounds otherwise, and 200 steps make much of that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def digits() -> tuple[Images, Images]:
    """(upright, turned): different images. Raises ImportError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError(
            "claims of kind digits need scikit-learn's images; install them: pip install 'loratory[metrics]'"
        ) from None
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(x, dtype=torch.float32)[order] / 16
    labels = torch.tensor(y)[order]
    turned = images[UPRIGHT:].unflatten(1, (8, 8)).rot90(1, (1, 2)).flatten(1)
    return Images(images[:UPRIGHT], labels[:UPRIGHT]), Images(turned, labels[UPRIGHT:])


def batches(images: Images, steps: int, seed: int) -> Iterator[Images]:
    """Batches over freshly ordered passes."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(rest) < BATCH:
            rest = torch.cat([rest, torch.randperm(len(images.y), generator=generator)])
        chosen, rest = rest[:BATCH], rest[BATCH:]
        yield images.rows(chosen)


@cache
def pretrained(width: int, blocks: int) -> Network:
    """The network that knows upright digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Network(width, blocks)
    train_in_full(model, digits()[0], int(PRETRAINING["steps"]), 0)
    return model


def train_in_full(model: nn.Module, images: Images, steps: int, seed: int) -> None:
    """All weights, by Adam at the rate of pretraining."""
    optimizer = torch.optim.Adam(model.parameters(), lr=PRETRAINING["rate"])
    for batch in batches(images, steps, seed):
        optimizer.zero_grad()
        batch_loss(model, batch).backward()
        optimizer.step()


def batch_loss(model: nn.Module, batch: Images) -> Tensor:
    return cross_entropy(model(batch.x), batch.y)


def attach(
    model: nn.Module,
    task: Task,
    method: str,
    options: Mapping[str, Any],
    seed: int,
    train: Images,
    name: str = "default",
) -> None:
    """Put the method on the network's blocks; one that starts from a gradient sees the training images once."""
    made, more = method_class(method)(**options), {}
    if made.needs:
        parts = [train.rows(slice(i, i + BATCH)) for i in range(0, task.samples, BATCH)]
        more["seen"] = lt.collect(model, parts, loss=batch_loss, where="blocks.*", what=sorted(made.needs))
    lt.adapt(model, made, "blocks.*", seed=seed, name=name, **more)


def fit(model: nn.Module, task: Task, train: Images, rate: float, seed: int) -> None:
    """Train the active adapter."""
    optimizer = torch.optim.AdamW(lt.param_groups(model, lr=rate), weight_decay=0.0)
    lt.drive(model, optimizer, task.steps, -(-task.samples // BATCH), seed=seed)
    for batch in batches(train, task.steps, seed):
        optimizer.zero_grad()
        loss = batch_loss(model, batch)
        if (more := lt.penalty(model)) is not None:
            loss = loss + more
        loss.backward()
        optimizer.step()


def learn(task: Task, method: str, options: Mapping[str, Any], rate: float, seed: int) -> tuple[nn.Module, int]:
    """(the adapted and trained network, numbers that were trained)."""
    train = digits()[1].rows(slice(DEV, DEV + task.samples))
    model: nn.Module = copy.deepcopy(pretrained(task.width, task.blocks))
    attach(model, task, method, options, seed, train)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fit(model, task, train, rate, seed)
    return model.eval(), numbers


@cache
def learned(task: Task, method: str, options: str, rate: float) -> Learned:
    """All seeds at one rate. options: as JSON."""
    turned = digits()[1]
    dev, test = turned.rows(slice(0, DEV)), turned.rows(slice(DEV + MOST_SAMPLES, None))
    found: dict[str, list[Any]] = {"dev": [], "test": [], "right": []}
    numbers = 0
    for seed in range(task.seeds):
        model, numbers = learn(task, method, json.loads(options), rate, seed)
        with torch.no_grad():
            found["dev"].append(each_loss(model(dev.x), dev.y))
            found["test"].append(each_loss(model(test.x), test.y))
            found["right"].append((model(test.x).argmax(-1) == test.y).double().numpy())
    return Learned(np.array(found["dev"]), np.array(found["test"]), np.array(found["right"]), numbers)


def each_loss(scores: Tensor, y: Tensor) -> Any:
    """Cross-entropy of each image; one that overflowed counts as that of a guess at the furthest."""
    return cross_entropy(scores.double(), y, reduction="none").nan_to_num(nan=1e3, posinf=1e3).numpy()


def at_best_rate(task: Task, arm: Mapping[str, Any]) -> tuple[float, Learned, list[float]]:
    """(rate with the best mean on dev, what was learned at it, rates tried)."""
    options = json.dumps(arm.get("options", {}), sort_keys=True)
    tried = {float(rate): learned(task, arm["method"], options, float(rate)) for rate in sorted(arm["rates"])}
    for _ in range(EXTENSIONS):
        further = beyond(list(tried), min(tried, key=lambda rate: tried[rate].dev.mean()))
        if further is None:
            break
        tried[further] = learned(task, arm["method"], options, further)
    best = min(tried, key=lambda rate: tried[rate].dev.mean())
    return best, tried[best], sorted(tried)


@one_thread()
def turned_digits(
    *, first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], measure: str, **task: Any
) -> dict[str, Any]:
    """First minus second on the test images, paired over seeds and images; of several on a side, the best on dev counts.

    measure: "percent of loss" (of the second's) or "points of accuracy". A side's entry: method, options, rates.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure is '{measure}'; it must be {', '.join(MEASURES)}")
    common = Task(**task)
    sides = []
    details: dict[str, Any] = {}
    for arms in (first, second):
        found = [(arm, *at_best_rate(common, arm)) for arm in arms]
        arm, rate, result, tried = min(found, key=lambda each: each[2].dev.mean())
        sides.append(result)
        details["first" if arms is first else "second"] = {
            "method": arm["method"],
            "options": arm.get("options", {}),
            "rate": rate,
            "rates tried": tried,
            "trained numbers": result.numbers,
            "loss": float(result.test.mean()),
            "accuracy (%)": 100 * float(result.right.mean()),
        }
    one, other = sides
    if measure == "percent of loss":
        table, scale = one.test - other.test, 100 / float(other.test.mean())
    else:
        table, scale = one.right - other.right, 100.0
    return of_images(table, scale) | details


def of_images(table: Table, scale: float) -> dict[str, Any]:
    """A claim's result, whose rows are images."""
    found = mean_difference(table, scale)
    return {"images" if key == "rows" else key: value for key, value in found.items()}


def turned(quarters: int) -> Images:
    """The images that pretraining did not see, turned by so many quarters."""
    images = digits()[1]  # turned by one already
    return Images(images.x.unflatten(1, (8, 8)).rot90(quarters - 1, (1, 2)).flatten(1), images.y)


def fused_drop(task: Task, arm: Mapping[str, Any], rate: float) -> tuple[Table, float]:
    """(loss of accuracy by fusing, seeds x test images; mean accuracy before) of three adapters that each learned one turn."""
    drops, before = [], []
    names = {f"quarter-{q}": turned(q) for q in (1, 2, 3)}
    for seed in range(task.seeds):
        model: nn.Module = copy.deepcopy(pretrained(task.width, task.blocks))
        for i, (name, images) in enumerate(names.items()):
            train = images.rows(slice(DEV, DEV + task.samples))
            attach(model, task, arm["method"], arm.get("options", {}), seed + 1000 * i, train, name)
            lt.use(model, name)
            fit(model, task, train, rate, seed)
        model.eval()
        alone, fused = [], []
        with torch.no_grad():
            for name, images in names.items():
                test = images.rows(slice(DEV + MOST_SAMPLES, None))
                lt.use(model, name)
                alone.append((model(test.x).argmax(-1) == test.y).double())
                lt.use(model, *names)
                fused.append((model(test.x).argmax(-1) == test.y).double())
        before.append(float(torch.stack(alone).mean()))
        drops.append((torch.stack(alone) - torch.stack(fused)).mean(0).numpy())
    return np.array(drops), float(np.mean(before))


@one_thread()
def fused_digits(*, first: Mapping[str, Any], second: Mapping[str, Any], **task: Any) -> dict[str, Any]:
    """How much more accuracy the first method loses than the second, in points, where three adapters are fused with weight 1.

    Each adapter learns the digits turned by 90, 180 or 270 degrees, at the rate that is best for 90. A side: method, options, rates.
    """
    common, tables = Task(**task), []
    details: dict[str, Any] = {}
    for side, arm in (("first", first), ("second", second)):
        rate, result, _ = at_best_rate(common, arm)
        table, before = fused_drop(common, arm, rate)
        tables.append(table)
        details[side] = {
            "method": arm["method"],
            "options": arm.get("options", {}),
            "rate": rate,
            "trained numbers": result.numbers,
            "accuracy alone (%)": 100 * before,
            "lost by fusing (points)": 100 * float(table.mean()),
        }
    return of_images(tables[0] - tables[1], 100.0) | details


@one_thread()
def trained_layer(seed: int) -> tuple[Tensor, Tensor]:
    """(weights before, after): the middle layer, 256 x 256, of an MLP that learned digits upright and then, trained in full, turned."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        middle = nn.Linear(256, 256)
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), middle, nn.ReLU(), nn.Linear(256, 10))
    upright, turned_ones = digits()
    before = Tensor()
    train = turned_ones.rows(slice(DEV, DEV + MOST_SAMPLES))
    for images, steps in ((upright, int(PRETRAINING["steps"])), (train, Task().steps)):
        before = middle.weight.detach().clone()
        train_in_full(model, images, steps, seed)
    return before, middle.weight.detach().clone()


DIGITS: dict[str, Callable[..., dict[str, Any]]] = {each.__name__: each for each in (turned_digits, fused_digits)}
