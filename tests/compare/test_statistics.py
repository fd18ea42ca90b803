import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from loratory.compare.statistics import (
    Pair,
    corrected,
    differences,
    estimate,
    holm,
    mean_is_headline,
    p_value,
    paired,
    ranked,
    spread,
    standings,
    stretch,
)
from tests.compare.made import judged_twice, made


def test_one_seed_is_a_t_test_over_rows():
    scores = np.random.default_rng(1).normal(0.3, 1.0, 200)
    found = estimate(scores[None], draws=20_000)
    right = stats.ttest_1samp(scores, 0)
    assert found.error == pytest.approx(stats.sem(scores))
    assert found.freedom == pytest.approx(199)
    assert p_value(found) == pytest.approx(right.pvalue)
    interval = right.confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.03 * found.error)


def test_scores_without_rows_are_a_t_test_over_seeds():
    scores = np.array([81.0, 83.5, 82.0, 84.0, 80.5])
    found = estimate(scores[:, None] - 80)
    assert (found.rows, found.seeds, found.freedom) == (1, 5, 4)
    assert found.error == pytest.approx(stats.sem(scores))
    assert p_value(found) == pytest.approx(stats.ttest_1samp(scores, 80).pvalue)


def test_paired_scores_are_a_paired_t_test():
    generator = np.random.default_rng(2)
    first, second = generator.normal(size=(2, 1, 100))
    table = paired({0: first[0]}, {0: second[0]})
    assert p_value(estimate(table)) == pytest.approx(stats.ttest_rel(first[0], second[0]).pvalue)


def test_the_variance_of_a_crossed_table_by_hand():
    table = np.array([[1.0, 2.0, 6.0], [2.0, 2.0, 2.0]])  # row means 1.5 2 4, seed means 3 2, mean 2.5
    of_rows = ((-1.0) ** 2 + (-0.5) ** 2 + 1.5**2) / 2 / 3
    of_seeds = (0.5**2 + 0.5**2) / 1 / 2
    rest = np.array([[-1.0, -0.5, 1.5], [1.0, 0.5, -1.5]])  # what neither rows nor seeds explain
    own = (rest**2).sum() / 2 / 6
    variance, freedom, keep = spread(table)
    assert own > of_seeds  # so that seeds add nothing that the rows have not counted
    assert variance == pytest.approx(of_rows)
    assert keep == 0
    assert freedom == pytest.approx(of_rows**2 / (of_seeds**2 / 1 + of_rows**2 / 2))


def test_seeds_add_what_rows_do_not_explain():
    table = np.array([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]])  # seeds 4 apart, on every row alike
    variance, _, keep = spread(table)
    assert variance == pytest.approx(1.0 / 3 + 8.0 / 2)
    assert keep == 1


@pytest.mark.parametrize(
    ("seeds", "rows", "of_seeds", "of_rows", "of_cells"),
    [
        (3, 150, 0.1, 1.0, 1.0),
        (3, 150, 0.0, 0.0, 1.0),
        (5, 150, 0.2, 1.0, 1.0),
        (1, 150, 0.0, 1.0, 0.5),
        (4, 1, 1.0, 0.0, 0.0),
        (2, 150, 1.0, 0.1, 0.1),
    ],
)
def test_intervals_cover_and_p_values_are_level(seeds, rows, of_seeds, of_rows, of_cells):
    generator = np.random.default_rng(5)
    covered = below = 0
    repeats = 1500
    for k in range(repeats):
        table = generator.normal(0, of_seeds, (seeds, 1)) + generator.normal(0, of_rows, (1, rows))
        found = estimate(table + generator.normal(0, of_cells, (seeds, rows)), draws=300, seed=k)
        covered += found.low <= 0 <= found.high
        below += p_value(found) < 0.05
    error = math.sqrt(0.05 * 0.95 / repeats)
    assert covered / repeats >= 0.95 - 4 * error - 0.005  # few draws: the ends of an interval are chance too
    assert below / repeats <= 0.05 + 4 * error


def test_plain_percentiles_would_be_too_narrow_for_three_seeds():
    assert stretch(2) == pytest.approx(4.302653 / 1.959964, rel=1e-5)
    assert stretch(1e9) == pytest.approx(1.0)
    found = estimate(np.array([[0.0], [1.0], [2.0]]), draws=40_000)
    right = stats.t.interval(0.95, 2, loc=1, scale=1 / math.sqrt(3))
    assert (found.low, found.high) == pytest.approx(right, abs=0.06)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_holm_keeps_the_chance_of_any_false_alarm():
    generator = np.random.default_rng(3)
    alarms = sum(min(holm(list(generator.uniform(size=9)))) < 0.05 for _ in range(2000))
    assert alarms / 2000 == pytest.approx(0.05, abs=0.015)


def pairs(values):
    return {Pair(names.split()): value for names, value in values.items()}


def test_pairs_with_the_baseline_are_corrected_over_themselves_and_others_over_all_by_hand():
    p = {"lora a": 0.04, "lora b": 0.01, "lora c": 0.03, "a b": 0.002, "a c": 0.009, "b c": 0.5}
    found = corrected(pairs(p), "lora")
    with_lora = {"lora b": 3 * 0.01, "lora c": 2 * 0.03, "lora a": 2 * 0.03}  # the last: no less than the one before it
    others = {"a b": 6 * 0.002, "a c": 5 * 0.009, "b c": 0.5}  # lora b, lora c and lora a stand between the last two
    assert {pair: value for pair, (value, _) in found.items()} == pytest.approx(pairs(with_lora | others))
    assert {pair: over for pair, (_, over) in found.items()} == pairs(
        dict.fromkeys(with_lora, 3) | dict.fromkeys(others, 6)
    )


def test_what_the_scores_chose_is_corrected_over_all_it_was_chosen_from():
    p = {"lora a": 0.9, "lora b": 0.9, "lora c": 0.9, "a b": 0.02, "a c": 0.9, "b c": 0.9}
    value, over = corrected(pairs(p), "lora")[Pair(("a", "b"))]
    assert (value, over) == (pytest.approx(0.12), 6)  # over the 3 comparisons with a it would be 0.06
    two, _ = corrected(pairs({"lora a": 0.02}), "lora")[Pair(("lora", "a"))]
    assert two == 0.02


@pytest.mark.parametrize("comparison", [judged_twice(), made({"lora": 0.8, "dora": 0.8, "full": 0.86, "frozen": 0.1})])
def test_a_pair_is_judged_the_same_from_both_sides(comparison):
    turned = {"better": "worse", "worse": "better", "not shown": "not shown"}
    rows = {(row.method, m): row for m in comparison.methods for row in differences(comparison, m)}
    for one, other in combinations(comparison.methods, 2):
        first, second = rows[one, other], rows[other, one]
        assert (first.p, first.adjusted, first.over) == (second.p, second.adjusted, second.over)
        assert first.over == (3 if comparison.baseline in (one, other) else 6)
        assert first.verdict == turned[second.verdict]
        assert first.estimate.value == -second.estimate.value


def test_the_best_and_the_baseline_take_the_verdict_of_the_baseline():
    comparison = judged_twice()
    row = next(row for row in differences(comparison, "full") if row.method == "lora")
    assert row.p == pytest.approx(0.0283, abs=1e-4)
    assert (row.adjusted, row.over, row.verdict) == (pytest.approx(3 * row.p), 3, "not shown")
    a, b = (row for row in differences(comparison, "full") if row.method != "lora")
    assert (a.verdict, b.verdict) == ("worse", "worse")
    assert (a.adjusted, b.adjusted) == (pytest.approx(5 * a.p), pytest.approx(6 * b.p))  # least of all 6, and the next


def test_no_spread_at_all_is_a_sign_test():
    assert p_value(estimate(np.zeros((2, 10)))) == 1.0
    assert p_value(estimate(np.ones((1, 4)))) == 2.0**-3


def test_one_score_has_no_interval():
    found = estimate(np.array([[3.0]]))
    assert (found.value, found.low, found.high, p_value(found)) == (3.0, None, None, None)


def test_what_is_no_table_of_scores_is_refused():
    with pytest.raises(ValueError, match="seeds x rows"):
        estimate(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="no finite number"):
        estimate(np.array([[1.0, math.nan]]))


def test_a_real_difference_is_called_real_and_its_direction_is_right():
    comparison = made({"lora": 0.8, "dora": 0.8, "full": 0.92, "head-only": 0.6})
    rows = {row.method: row for row in differences(comparison, "lora")}
    assert {method: row.verdict for method, row in rows.items()} == {
        "dora": "not shown",
        "full": "better",
        "head-only": "worse",
    }
    assert rows["full"].better > rows["full"].worse
    assert rows["full"].estimate.value > 0 > rows["head-only"].estimate.value
    assert [row.method for row in ranked(comparison, standings(comparison))][0::3] == ["full", "head-only"]
    assert rows["full"].adjusted >= rows["full"].p


def test_equal_methods_are_seldom_called_different():
    alarms = 0
    for draw in range(60):
        (row,) = differences(made({"lora": 0.8, "dora": 0.8}, rates=(1e-3,), count=150, draw=draw), "lora")
        alarms += row.verdict != "not shown"
    assert alarms <= 8  # 3 are meant


def test_less_is_better_turns_the_verdict_round():
    comparison = made({"lora": 0.8, "full": 0.92}, greater_is_better=False)
    (row,) = differences(comparison, "lora")
    assert (row.verdict, row.better < row.worse) == ("worse", True)
    assert ranked(comparison, standings(comparison))[0].method == "lora"


def test_pairs_are_of_common_seeds_only():
    comparison = made({"lora": 0.8, "dora": 0.8}, lost={("dora", 1e-3, 1): "failed"})
    assert standings(comparison)[1].lost == 1
    (row,) = differences(comparison, "lora")
    assert row.estimate.seeds == 2
    each = {
        m: {r.seed: r.test_each for r in comparison.runs if r.method == m and r.test_each} for m in ("lora", "dora")
    }
    right = 100 * np.mean([np.subtract(each["dora"][s], each["lora"][s]).mean() for s in (0, 2)])
    assert row.estimate.value == pytest.approx(right)


def test_only_runs_at_the_chosen_rate_count():
    comparison = made({"lora": 0.8}, best={"lora": 3e-3})
    (row,) = standings(comparison)
    tested = [run.test["accuracy"] for run in comparison.runs if run.test]
    assert (row.rate, len(tested)) == (3e-3, 3)
    assert {run.learning_rate for run in row.runs} == {3e-3}
    assert row.estimate.value == pytest.approx(100 * np.mean(tested), abs=1e-3)


def test_without_test_scores_dev_is_used_and_said():
    rows = standings(made({"lora": 0.8, "dora": 0.81}, test=False))
    assert {row.on for row in rows} == {"dev"}
    assert rows[0].estimate.rows == 1


def test_a_method_without_a_run_is_not_measured():
    lost = {("dora", rate, seed): "failed" for rate in (3e-4, 1e-3, 3e-3) for seed in (0, 1, 2)}
    comparison = made({"lora": 0.8, "dora": 0.8}, lost=lost)
    (row,) = differences(comparison, "lora")
    assert (row.verdict, row.p, row.estimate) == ("not measured", None, None)


def test_a_metric_that_is_no_mean_of_rows_is_seen():
    assert mean_is_headline(made({"lora": 0.8}))
    other = made({"lora": 0.8})
    for run in other.runs:
        if run.test:
            run.test["accuracy"] += 0.01
    assert not mean_is_headline(other)
