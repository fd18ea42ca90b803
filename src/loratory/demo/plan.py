"""What the demo does: three jobs, each measured before (or with its head alone) and after LoRA and DoRA."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

DRAWS = 1000  # bootstrap draws of each interval
SAMPLE_SEED = 0  # of the test rows that are measured


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to do a job: the base as it is, or one method."""

    label: str
    method: str | None = None  # None: the base, not trained
    learning_rate: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)  # the method's hyper-parameters


@dataclass(frozen=True, kw_only=True)
class Job:
    """One task on one data set, with the arms that are compared; the first arm is what the others are held against."""

    name: str  # of its folder
    title: str
    about: str  # a sentence for the report
    base: str
    base_title: str
    data: str  # folder under data/
    ending: str  # of its train, dev and test files
    task: str
    task_options: dict[str, Any]
    scores: dict[str, str]  # metric on the test rows -> axis label with its unit; the first one is the headline
    dev_score: tuple[str, str]  # metric on the dev rows during training, and its axis label
    arms: tuple[Arm, ...]
    steps: int
    batch: int  # rows a step
    evaluations: int  # on dev, during training
    dev_rows: int
    test_rows: int
    measured_at_once: int  # rows a forward pass of the measurement
    needs_entity: bool = False  # examples are taken from rows that hold an entity

    @property
    def headline(self) -> str:
        return next(iter(self.scores))


def compared(start: Arm, learning_rate: float, alpha: float) -> tuple[Arm, ...]:
    """What the methods are held against, then the methods."""
    options = {"rank": 8, "alpha": alpha}
    return (
        start,
        Arm(label="LoRA", method="lora", learning_rate=learning_rate, options=options),
        Arm(label="DoRA", method="dora", learning_rate=learning_rate, options=options),
    )


# Rates and alphas were chosen on dev. Where a new head is trained, alpha is small: the head needs a high rate, at which
# an adapter with a large alpha diverges.
JOBS = (
    Job(
        name="facts",
        title="Restaurant facts to sentences",
        about="SmolLM2 turns a list of facts about a restaurant into a sentence (data set E2E, several right answers a row).",
        base="smollm2-135m",
        base_title="SmolLM2-135M-Instruct",
        data="e2e",
        ending="jsonl",
        task="chat",
        task_options={
            "prompt_template": "Turn these facts into a sentence: {mr}",
            "completion_column": "ref",
            "references_column": "refs",
            "max_new_tokens": 64,
        },
        scores={"bleu": "BLEU (0 to 100, sacrebleu)", "chrf": "chrF (0 to 100, sacrebleu)"},
        dev_score=("token_loss", "loss on dev (nats a token)"),
        arms=compared(Arm(label="before"), learning_rate=1e-3, alpha=16.0),
        steps=24,
        batch=4,
        evaluations=2,
        dev_rows=16,
        test_rows=64,
        measured_at_once=40,
    ),
    Job(
        name="intents",
        title="Intents of bank customers",
        about="MiniLM reads a customer's question and names one of 77 intents (data set Banking77).",
        base="minilm-l6",
        base_title="all-MiniLM-L6-v2",
        data="banking77",
        ending="jsonl",
        task="classification",
        task_options={"max_length": 32},
        scores={"accuracy": "accuracy (share of rows, 0 to 1)"},
        dev_score=("accuracy", "accuracy on dev (share of rows)"),
        arms=compared(Arm(label="head only", method="head-only", learning_rate=1e-1), learning_rate=2.5e-2, alpha=0.5),
        steps=150,
        batch=16,
        evaluations=3,
        dev_rows=200,
        test_rows=800,
        measured_at_once=50,
    ),
    Job(
        name="diseases",
        title="Names of diseases in medical abstracts",
        about="MiniLM marks the words that name a disease (data set NCBI disease); an entity counts only if both its ends are right.",
        base="minilm-l6",
        base_title="all-MiniLM-L6-v2",
        data="ncbi_disease",
        ending="conll",
        task="tagging",
        task_options={"max_length": 96},
        scores={"f1": "entity F1 (0 to 1)", "precision": "precision (0 to 1)", "recall": "recall (0 to 1)"},
        dev_score=("f1", "entity F1 on dev (0 to 1)"),
        arms=compared(Arm(label="head only", method="head-only", learning_rate=4e-2), learning_rate=8e-3, alpha=4.0),
        steps=100,
        batch=12,
        evaluations=2,
        dev_rows=120,
        test_rows=400,
        measured_at_once=40,
        needs_entity=True,
    ),
)


def quick(job: Job) -> Job:
    """The same job with next to no work: it shows that everything runs, its numbers mean nothing."""
    options = job.task_options | ({"max_new_tokens": 8} if job.task == "chat" else {})
    return replace(
        job, steps=2, batch=2, evaluations=1, dev_rows=4, test_rows=8, measured_at_once=8, task_options=options
    )
