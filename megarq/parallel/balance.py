"""Cutting a list of layers into contiguous stages of nearly equal weight."""

from collections.abc import Sequence
from itertools import accumulate, pairwise


def balanced_parts(weights: Sequence[int], parts: int) -> list[range]:
    """Cut 0 .. len(weights) - 1 into `parts` contiguous, non-empty ranges whose largest sum of weights is smallest.

    Exact, by dynamic programming over the place of each cut.
    """
    count = len(weights)
    assert count >= parts, "a part needs a layer"
    before = [0, *accumulate(weights)]  # before[i]: weight of the first i layers
    # best[i]: smallest largest part of the first i layers, and where its last part begins.
    best: list[tuple[float, int]] = [(weight, 0) for weight in before]
    cuts: list[list[int]] = []
    for number in range(2, parts + 1):
        new: list[tuple[float, int]] = [(float("inf"), 0)] * (count + 1)
        for end in range(number, count + 1):
            new[end] = min(
                (max(best[start][0], before[end] - before[start]), start) for start in range(number - 1, end)
            )
        cuts.append([start for _, start in new])
        best = new
    ends = [count]
    for starts in reversed(cuts):
        ends.append(starts[ends[-1]])
    bounds = [0, *reversed(ends)]
    return [range(start, end) for start, end in pairwise(bounds)]
