"""Contiguous parts whose largest is smallest, against trying every cut."""

from itertools import combinations, pairwise

import pytest

from megarq.parallel.balance import balanced_parts


def best_by_trial(weights: list[int], parts: int) -> int:
    bounds = ([0, *cuts, len(weights)] for cuts in combinations(range(1, len(weights)), parts - 1))
    return min(max(sum(weights[a:b]) for a, b in pairwise(cuts)) for cuts in bounds)


@pytest.mark.parametrize("weights", [[1, 5, 5, 5, 1], [0, 1, 1, 1, 9], [3] * 8, [9, 1, 1, 1, 1, 1, 1, 8], [0, 0, 0, 4]])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_the_largest_part_is_as_small_as_any_cut_makes_it(weights, parts):
    ranges = balanced_parts(weights, parts)
    assert [index for part in ranges for index in part] == list(range(len(weights)))
    assert len(ranges) == parts and all(ranges)
    assert max(sum(weights[index] for index in part) for part in ranges) == best_by_trial(weights, parts)
