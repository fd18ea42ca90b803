"""Budgets shared out by score: ranks from candidates, entries of matrices."""

import pytest
import torch

from loratory.ops.allocation import entries_by_score, ranks_by_score

# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", [(16, 24, 32, 40, 48), (1, 2), (2, 9, 10), (1, 2, 6), (3, 4, 5, 40)])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 10, 23, 224])
def test_the_budget_is_kept_and_larger_scores_have_no_smaller_ranks(candidates, count):
    scores = torch.rand(count, generator=torch.Generator().manual_seed(count)).tolist()
    ranks = ranks_by_score(scores, candidates)
    budget = count * sum(candidates) / len(candidates)
    assert sum(ranks) <= budget
    if count % len(candidates) == 0 or candidates[0] == 16:
        assert sum(ranks) == budget
    ordered = [rank for _, rank in sorted(zip(scores, ranks, strict=True))]
    assert ordered == sorted(ordered)
    sizes = [ranks.count(rank) for rank in candidates]
    assert max(sizes) - min(sizes) <= 1
    assert ranks_by_score(scores, candidates) == ranks


def test_ties_go_by_order_and_remainders_to_the_nearest_groups():
    assert ranks_by_score([1.0] * 6, (2, 4, 6)) == [6, 6, 4, 4, 2, 2]
    assert ranks_by_score([0.0, 1.0, 1.0], (2, 4, 6)) == [2, 6, 4]
    assert ranks_by_score([1.0] * 4, (2, 4, 6)) == [6, 4, 4, 2]
    assert sorted(ranks_by_score([1.0] * 7, (16, 24, 32, 40, 48))) == [16, 24, 24, 32, 40, 40, 48]


# -- entries -----------------------------------------------------------------------------------------------------------


def test_shares_by_hand():
    assert entries_by_score(30, [0.001, 0.999], [100, 100]) == [0, 29]
    assert entries_by_score(30, [0.001, 0.999], [100, 100], least=0.05) == [5, 24]
    assert entries_by_score(60, [0.5, 0.3, 0.2], [100, 100, 100]) == [30, 18, 12]
    assert entries_by_score(60, [0.75, 0.1875, 0.0625], [20, 100, 100]) == [
        20,
        30,
        9,
    ]  # 11 and 3; 26 left, in parts 3 to 1
    assert entries_by_score(130, [0.75, 0.1875, 0.0625], [20, 25, 100]) == [20, 25, 85]
    assert entries_by_score(1000, [0.75, 0.1875, 0.0625], [20, 25, 100]) == [20, 25, 100]
    assert entries_by_score(60, [1.0, 0.0, 0.0], [20, 30, 10]) == [20, 30, 10]  # no score left: equal parts
    assert entries_by_score(7, [1 / 3] * 3, [9, 9, 9]) == [2, 2, 2]
    assert entries_by_score(0, [0.5, 0.5], [9, 9]) == [0, 0]


def test_large_numbers_lose_no_entry():
    cap = (1 << 24) + 1
    kept = entries_by_score(72 * cap, [1 / 72] * 72, [cap] * 72)
    assert kept == [cap] * 72


def test_the_sum_is_the_volume_less_a_part_of_an_entry_for_each():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        entries = torch.randint(1, 500, (20,), generator=generator).tolist()
        raw = torch.rand(20, generator=generator).pow(8).tolist()
        volume = int(torch.randint(0, sum(entries) + 1, (1,), generator=generator))
        kept = entries_by_score(volume, [r / sum(raw) for r in raw], entries)
        assert volume - 20 <= sum(kept) <= volume
        assert all(0 <= n <= cap for n, cap in zip(kept, entries, strict=True))
