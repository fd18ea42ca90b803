"""What a comparison found: its runs, and all that a report needs to tell them."""

from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["done", "failed", "killed", "diverged"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run, as the results file gives it.

    `dev` holds the metrics at the end on the dev rows. `test` and `test_each` are there for the chosen learning rates alone, which
    were measured on test once; `test_each` is the headline score of each test row, the same rows in the same order for every run.
    `loss_curve` and `dev_curve` are (step, value), the second of the headline metric on dev.
    """

    method: str  # its label: "lora", "lora rank=16", "peft:vera", "full"
    settings: dict[str, Any]
    seed: int
    learning_rate: float
    status: Status
    error: str | None
    trained: int
    total: int
    adapter_bytes: int | None
    peak_memory: int | None
    seconds: float | None
    steps: int | None
    dev: dict[str, float]
    test: dict[str, float] | None
    test_each: list[float] | None
    loss_curve: list[tuple[int, float]]
    dev_curve: list[tuple[int, float]]
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that a report needs: what was compared, on which rows, under which budget, and every run.

    `methods` and `seeds` are in the order in which they were asked for; `rates` are each method's tried learning rates;
    `chosen` each method's rate that was best on dev, and absent where every run of a method failed; `warnings` what a reader must
    know, one sentence each; `rows` the counts of train, dev and test; `fingerprint` a digest of those rows.
    """

    name: str
    task: str
    base: str
    metric: str
    metric_label: str  # with its unit: "Accuracy (%)"
    metric_scale: float  # what a stored score is multiplied with to be shown in that unit
    greater_is_better: bool
    budget: dict[str, Any]
    baseline: str
    methods: list[str]
    seeds: list[int]
    rates: dict[str, list[float]]
    chosen: dict[str, float]
    runs: list[Run]
    rows: dict[str, int]
    test_texts: list[str] | None
    fingerprint: str
    warnings: list[str]
    created: str
    machine: dict[str, str]
    command: str
