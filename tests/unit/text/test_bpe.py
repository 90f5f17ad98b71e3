from random import Random

from megarq.text.bpe import merge_symbols

RANKS = {"lo": 0, "er": 1, "low": 2, "lower": 3, "aa": 4}


def merge(left: str, right: str) -> tuple[float, str] | None:
    rank = RANKS.get(left + right)
    return None if rank is None else (rank, left + right)


def test_merges_follow_their_ranks() -> None:
    assert merge_symbols(list("lower"), merge, 0.0, Random(0)) == ["lower"]


def test_equal_merges_go_from_the_left() -> None:
    assert merge_symbols(list("aaa"), merge, 0.0, Random(0)) == ["aa", "a"]


def test_no_symbols_give_no_symbols() -> None:
    assert merge_symbols([], merge, 0.0, Random(0)) == []


def test_rate_one_leaves_the_symbols_apart() -> None:
    assert merge_symbols(list("lower"), merge, 1.0, Random(0)) == list("lower")


def test_a_dropped_merge_gets_another_chance_after_the_next_one() -> None:
    """`lo` is dropped, `er` is merged, `lo` is drawn again and kept."""

    class Draws(Random):
        values = iter([0.0, 0.9, 0.9, 0.9, 0.9])

        def random(self) -> float:
            return next(self.values)

    assert merge_symbols(list("lower"), merge, 0.5, Draws()) == ["lower"]


def test_two_merges_of_one_word_are_dropped_independently() -> None:
    """With `aaaa` -> {aa aa, a a aa, aa a a, a aa a, a a a a}: nothing remains with probability rate**3."""
    random = Random(0)
    untouched = sum(len(merge_symbols(list("aaaa"), merge, 0.5, random)) == 4 for _ in range(4000)) / 4000
    assert abs(untouched - 0.125) < 0.02
