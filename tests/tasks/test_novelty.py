"""The novelty filter of Self-Instruct."""

import pytest

from loratory.tasks.novelty import ascii_words, longest_common_subsequence, novelty, rouge_l


def test_longest_common_subsequence():
    assert longest_common_subsequence("abcbdab", "bdcaba") == 4
    assert longest_common_subsequence("abc", "cab") == 2
    assert longest_common_subsequence("", "abc") == longest_common_subsequence("abc", "") == 0


def test_rouge_l_is_symmetric_and_at_most_1():
    a, b = list("abcdef"), list("abxdyf")
    assert rouge_l(a, b) == rouge_l(b, a) == pytest.approx(2 * 4 / 12)
    assert rouge_l(a, a) == 1.0
    assert rouge_l(a, []) == rouge_l([], []) == 0.0


def test_what_is_kept_joins_the_pool():
    texts = ["Name five birds", "Name five birds!", "Name five fish", "name six fish here"]
    found = novelty(texts, [])
    assert [each.kept for each in found] == [True, False, True, True]
    assert found[1].score == 1.0
    assert found[2].score == pytest.approx(2 / 3)
    assert [each.kept for each in novelty(texts, ["Name five fish"], threshold=0.5)] == [False, False, False, False]
    assert [each.kept for each in novelty(texts, [], threshold=1.0)] == [True, False, True, True]


def test_words_of_other_scripts_need_a_tokenizer():
    assert ascii_words("Café, au-lait 2x") == ["caf", "au", "lait", "2x"]
    twice = ["写一首诗", "写一首诗"]
    assert [each.kept for each in novelty(twice, [])] == [True, True]
    assert [each.kept for each in novelty(twice, [], split=list)] == [True, False]


def test_bad_threshold():
    for threshold in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"threshold is {threshold}; it must lie in \(0, 1\]"):
            novelty([], [], threshold=threshold)
