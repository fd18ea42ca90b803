"""Metrics of predictions, and their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from loratory.tasks.task import Metrics


def bootstrap(score: Callable[[Any], Metrics], rows: int, draws: int = 0, seed: int = 0) -> Metrics:
    """score(all rows); with draws, also the 95 % percentile interval of each metric over resampled rows."""
    metrics = score(np.arange(rows))
    if draws:
        generator = np.random.default_rng(seed)
        samples = [score(generator.integers(0, rows, rows)) for _ in range(draws)]
        for key in list(metrics):
            low, high = np.percentile([sample[key] for sample in samples], [2.5, 97.5])
            metrics |= {f"{key}_low": float(low), f"{key}_high": float(high)}
    return metrics


def translation_scores(texts: Sequence[str], references: Sequence[Sequence[str]], *, draws: int = 0) -> Metrics:
    """Corpus BLEU and chrF (0 to 100) by sacrebleu, each text against any number of references."""
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ImportError("BLEU and chrF need sacrebleu; run: pip install 'loratory[metrics]'") from error
    pairs = [(text, refs) for text, refs in zip(texts, references, strict=True) if refs]
    if not pairs:
        return {}
    widest = max(len(refs) for _, refs in pairs)
    streams: Any = [[r[i] if i < len(r) else None for _, r in pairs] for i in range(widest)]
    metrics: Metrics = {}
    for key, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        # The two steps of sacrebleu's corpus_score, kept apart so that resampling need not count n-grams again; its own
        # bootstrap fails where a resampled score is exactly 0.
        counts = np.array(metric._extract_corpus_statistics([text for text, _ in pairs], streams))
        metrics |= bootstrap(_scorer(key, metric, counts), len(pairs), draws)
    return metrics


def sentence_scores(texts: Sequence[str], references: Sequence[Sequence[str]], metric: str) -> list[float]:
    """bleu (with n-grams by effective order, smoothed) or chrf (0 to 100) of each text alone, by sacrebleu."""
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ImportError("BLEU and chrF need sacrebleu; run: pip install 'loratory[metrics]'") from error
    scorer: Any = BLEU(effective_order=True) if metric == "bleu" else CHRF()
    return [float(scorer.sentence_score(text, list(refs)).score) for text, refs in zip(texts, references, strict=True)]


def _scorer(key: str, metric: Any, counts: Any) -> Callable[[Any], Metrics]:
    return lambda rows: {key: float(metric._compute_score_from_stats(counts[rows].sum(0).tolist()).score)}
