from itertools import pairwise
from random import Random

import pytest

from megarq.text.bpe import LONGEST, Drops, WordMerger, merge_symbols

RANKS = {"lo": 0, "er": 1, "low": 2, "lower": 3, "aa": 4}


def merge(left: str, right: str) -> tuple[float, str] | None:
    rank = RANKS.get(left + right)
    return None if rank is None else (rank, left + right)


def test_merges_follow_their_ranks() -> None:
    assert merge_symbols(list("lower"), merge, Drops(0.0, Random(0))) == ["lower"]


def test_equal_merges_go_from_the_left() -> None:
    assert merge_symbols(list("aaa"), merge, Drops(0.0, Random(0))) == ["aa", "a"]


def test_no_symbols_give_no_symbols() -> None:
    assert merge_symbols([], merge, Drops(0.0, Random(0))) == []


def test_rate_one_leaves_the_symbols_apart() -> None:
    assert merge_symbols(list("lower"), merge, Drops(1.0, Random(0))) == list("lower")


def test_a_dropped_merge_gets_another_chance_after_the_next_one() -> None:
    """`lo` is dropped, `er` is merged, `lo` is drawn again and kept."""

    answers = iter([True, False, False, False, False])
    assert merge_symbols(list("lower"), merge, answers.__next__) == ["lower"]


def test_two_merges_of_one_word_are_dropped_independently() -> None:
    """With `aaaa` -> {aa aa, a a aa, aa a a, a aa a, a a a a}: nothing remains with probability rate**3."""
    drops = Drops(0.5, Random(0))
    untouched = sum(len(merge_symbols(list("aaaa"), merge, drops)) == 4 for _ in range(4000)) / 4000
    assert abs(untouched - 0.125) < 0.02


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_words_merged_from_memory_ask_for_the_same_drops_and_give_the_same(rate: float) -> None:
    """Letters a and b with all merges of up to three letters, in an order that puts some long ones first."""
    source, table = Random(1), {"ab": 3, "ba": 0, "aa": 5, "bb": 2, "aba": 1, "bab": 6, "aab": 4, "abb": 2}

    def merge(left: str, right: str) -> tuple[float, str] | None:
        return (table[left + right], left + right) if left + right in table else None

    merger = WordMerger(merge)
    words = ["".join(source.choices("ab", k=source.randint(0, LONGEST + 4))) for _ in range(300)] * 2
    remembered, plain = Drops(rate, Random(2)), Drops(rate, Random(2))
    for word in words:
        assert list(merger(tuple(word), remembered)) == merge_symbols(word, merge, plain)
        assert remembered.kept == plain.kept


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.7, 1.0])
def test_drops_are_independent_of_each_other_and_have_their_rate(rate: float) -> None:
    drops = Drops(rate, Random(3))
    answers = [drops() for _ in range(40_000)]
    assert abs(sum(answers) / len(answers) - rate) < 0.01
    after_a_drop = [later for earlier, later in pairwise(answers) if earlier]
    assert abs(sum(after_a_drop) - rate * len(after_a_drop)) <= 0.03 * len(after_a_drop)
