"""Which texts say something new: the ROUGE-L filter of Self-Instruct."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

Split = Callable[[str], Sequence[str]]


class Novelty(NamedTuple):
    score: float  # largest ROUGE-L F against the pool and the texts kept before
    kept: bool


def novelty(
    candidates: Iterable[str], pool: Iterable[str], *, threshold: float = 0.7, split: Split | None = None
) -> list[Novelty]:
    """Each candidate in order: kept, and put into the pool, where its ROUGE-L F against all of it is below the threshold.

    split: text -> words; by default runs of a-z and 0-9 in lower case, as the package rouge-score has them without stemming. A
    text in another script has no such words and scores 0 against everything: pass the tokenizer's `tokenize`.
    Source: arXiv 2212.10560, section 2.2. Raises ValueError if the threshold lies outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it must lie in (0, 1]: a ROUGE-L score is at most 1")
    split = split or ascii_words
    seen, out = [split(text) for text in pool], []
    for text in candidates:
        words = split(text)
        score = max((rouge_l(words, other) for other in seen), default=0.0)
        out.append(Novelty(score, score < threshold))
        if score < threshold:
            seen.append(words)
    return out


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """F = 2 P R / (P + R) of the longest common subsequence: P = LCS / len(a), R = LCS / len(b)."""
    common = longest_common_subsequence(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for left in a:
        diagonal = 0
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if left == right else max(row[j], row[j - 1])
    return row[-1]


def ascii_words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())
