"""Comparisons as an engine would give them, with scores that are drawn, for tests of statistics and report."""

from dataclasses import replace

import numpy as np

from loratory.compare.outcome import Comparison, Run

VERSIONS = {"loratory": "0.1.0", "torch": "2.13.0"}


def made(
    true,
    *,
    seeds=(0, 1, 2),
    count=300,
    rates=(3e-4, 1e-3, 3e-3),
    best=None,
    rows=True,
    test=True,
    lost=(),
    noise=0.01,
    texts=True,
    draw=0,
    **changes,
):
    """A comparison of {method: true accuracy}; `best`: {method: chosen rate}; `lost`: {(method, rate, seed): status}."""
    generator = np.random.default_rng(draw)
    ease = generator.uniform(size=count)
    runs, chosen = [], {}
    for place, (method, accuracy) in enumerate(true.items()):
        own = () if method == "frozen" else rates
        chosen[method] = (best or {}).get(method, own[len(own) // 2]) if own else 0.0
        for rate in own or (0.0,):
            for seed in seeds:
                status = dict(lost).get((method, rate, seed), "done")
                shift = generator.normal(0, noise) - 0.04 * abs(np.log10(rate / chosen[method])) if own else 0.0
                each = (0.7 * ease + 0.3 * generator.uniform(size=count) < accuracy + shift).astype(float)
                is_best = rate == chosen[method] and status == "done"
                done = status == "done"
                dev = float(np.clip(accuracy + shift, 0, 1))
                steps = range(50, 301, 50)
                runs.append(
                    Run(
                        method=method,
                        settings={
                            "method": method,
                            "rank": 8 + place,
                            "base": "minilm-l6",
                            "max_steps": 300,
                            "learning_rate": rate,
                            "seed": seed,
                        },
                        seed=seed,
                        learning_rate=rate,
                        status=status,
                        error=None if done else f"loss is nan at step 12 of {method}",
                        trained=0 if method == "frozen" else 1000 * 4**place,
                        total=22_000_000,
                        adapter_bytes=4000 * 4**place if done else None,
                        peak_memory=(600 + 40 * place) * 2**20 if done else None,
                        seconds=60.0 + 7 * place if done else None,
                        steps=300 if done else None,
                        dev={"accuracy": dev, "loss": 1 - dev} if done else {},
                        test={"accuracy": round(float(each.mean()), 6)} if is_best and test else None,
                        test_each=each.tolist() if is_best and test and rows else None,
                        loss_curve=[(s, 4 * np.exp(-s / 120) + 0.1 * place) for s in steps] if done and own else [],
                        dev_curve=[(s, dev * (1 - np.exp(-s / 90))) for s in steps] if done and own else [],
                        versions=VERSIONS,
                    )
                )
    values = {
        "name": "intents",
        "task": "classification",
        "base": "minilm-l6",
        "metric": "accuracy",
        "metric_label": "accuracy (%)",
        "metric_scale": 100.0,
        "greater_is_better": True,
        "budget": {"kind": "steps", "amount": 300.0, "methods": {}},
        "baseline": next(iter(true)),
        "methods": list(true),
        "seeds": list(seeds),
        "rates": {method: [] if method == "frozen" else list(rates) for method in true},
        "chosen": chosen,
        "runs": runs,
        "rows": {"train": 1000, "dev": 200, "test": count},
        "test_texts": [f"where is my card number {i}?" for i in range(count)] if texts else None,
        "fingerprint": "0123456789abcdef" * 4,
        "warnings": [],
        "created": "2026-01-02 03:04:05 UTC",
        "machine": {"system": "Linux", "cores": "2"},
        "command": "loratory compare --preset intents",
    }
    return Comparison(**(values | changes))


def scored(each):
    """A comparison of {method: {seed: scores of the test rows}}; the first method is the baseline."""
    seeds = sorted({seed for by_seed in each.values() for seed in by_seed})
    count = len(next(iter(next(iter(each.values())).values())))
    found = made(dict.fromkeys(each, 0.5), seeds=seeds, rates=(1e-3,), count=count)
    runs = [
        replace(run, test={"accuracy": float(np.mean(rows))}, test_each=list(map(float, rows)))
        for run in found.runs
        if (rows := each[run.method].get(run.seed)) is not None
    ]
    return replace(found, metric_label="score", metric_scale=1.0, runs=runs)


WIDE, NEAR = np.tile([1.15, -1.15], 5), np.repeat([0.1, -0.1], 5)  # rows of mean 0


def judged_twice():
    """full, the best by 1, and lora, the baseline: p = 0.028, or 0.085 after the 3 comparisons with lora.

    full beats a and b with p of 1e-10: of the 3 comparisons with full that with lora would be the last, and 0.028 real.
    """
    return scored({"lora": {0: WIDE - 1}, "a": {0: NEAR - 0.9}, "b": {0: -NEAR - 1}, "full": {0: 0 * NEAR}})
