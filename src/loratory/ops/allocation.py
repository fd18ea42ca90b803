"""Sharing out a budget among the layers of a model by their scores."""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations


def ranks_by_score(scores: Sequence[float], candidates: Sequence[int]) -> list[int]:
    """A rank for each score, a larger one never a smaller rank; ties by order. At most len(scores) * mean(candidates) in all.

    Groups of the candidates have equal sizes. Of the layers left over each goes to another group: to those with the largest sum that the
    budget allows, of these to the ones nearest the mean.
    """
    size, left = divmod(len(scores), len(candidates))
    mean = Fraction(sum(candidates), len(candidates))
    fitting = [more for more in combinations(candidates, left) if sum(more) <= left * mean]
    more = max(fitting, key=lambda ranks: (sum(ranks), -sum(abs(rank - mean) for rank in ranks)))
    ranks = [rank for rank in reversed(candidates) for _ in range(size + (rank in more))]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    found = dict(zip(order, ranks, strict=True))
    return [found[i] for i in range(len(scores))]


def entries_by_score(volume: int, scores: Sequence[float], entries: Sequence[int], least: float = 0.0) -> list[int]:
    """How many of its entries each matrix keeps: in proportion to its score, none more than it has.

    What the full ones cannot take goes to the others, again in proportion. The sum is below volume by less than one for each matrix.
    """
    floors = [math.ceil(least * cap) for cap in entries]
    volume, room = max(0, volume - sum(floors)), [cap - low for cap, low in zip(entries, floors, strict=True)]
    kept = [float(min(most, math.floor(volume * score))) for most, score in zip(room, scores, strict=True)]
    for _ in entries:  # each round spends all that is left, or fills a matrix
        left = volume - sum(kept)
        open_ = [i for i, most in enumerate(room) if kept[i] < most]
        if left <= 0 or not open_:
            break
        total = sum(scores[i] for i in open_)
        for i in open_:
            kept[i] += min(left * (scores[i] / total if total > 0 else 1 / len(open_)), room[i] - kept[i])
    return [low + math.floor(n) for low, n in zip(floors, kept, strict=True)]
