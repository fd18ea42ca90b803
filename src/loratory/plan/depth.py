"""Deep models from shallow ones: with equal blocks, memory is a straight line in their number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loratory.plan.clock import Rates
from loratory.plan.job import Job
from loratory.plan.memory import Plan, plan_job

DEPTHS = (2, 3, 4)
TOLERANCE = 0.002  # how far the middle depth may lie off the line through the others


def plan_deep(job: Job, rates: Rates | None = None) -> Plan:
    """As `plan_job`. A job that can be `cut` to fewer blocks is planned at three depths; off the line, at its own depth."""
    if job.cut is None or job.depth is None or job.depth <= DEPTHS[-1] + 1:
        return plan_job(job, rates)
    low, middle, high = (plan_job(job.cut(depth), rates) for depth in DEPTHS)
    if any(_bent(low.parts[p], middle.parts[p], high.parts[p], low.peak) for p in low.parts) or low.phase != high.phase:
        return plan_job(job, rates)
    share = (job.depth - DEPTHS[0]) / (DEPTHS[-1] - DEPTHS[0])

    def line(a: float, b: float) -> int:
        return round(a + (b - a) * share)

    def lines(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
        return {key: line(a[key], b[key]) for key in a}

    parts = lines(low.parts, high.parts)
    seconds = None
    if low.step_seconds is not None and high.step_seconds is not None:
        seconds = low.step_seconds + (high.step_seconds - low.step_seconds) * share
    return replace(
        high, job=job, peak=sum(parts.values()), parts=parts, startup=lines(low.startup, high.startup),
        adapter_bytes=line(low.adapter_bytes, high.adapter_bytes), trained=line(low.trained, high.trained),
        total=line(low.total, high.total), step_seconds=seconds,
    )  # fmt: skip


def _bent(a: int, b: int, c: int, whole: int) -> bool:
    between = a + (c - a) * (DEPTHS[1] - DEPTHS[0]) / (DEPTHS[2] - DEPTHS[0])
    return abs(b - between) > TOLERANCE * whole
