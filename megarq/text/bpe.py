"""Byte-pair merging with a dropout that can be seeded: the part of a tokenizer that its library keeps to itself.

Libraries offer BPE dropout (Provilkov et al. 2020, arXiv 1910.13267, algorithm 1), but draw it from a generator that
nobody can seed. Here a step looks at all merges that are possible now, drops each with probability `rate`, and applies
the best one left; when none is left, the word is done. At rate 0 that is plain BPE:
l o w e r -> lo w e r -> lo w er -> low er -> lower.
"""

import heapq
from collections.abc import Callable
from random import Random
from typing import Any

Merge = Callable[[Any, Any], tuple[float, Any] | None]
"""(left, right) -> (priority, merged symbol), the lowest priority first, or None where the two do not merge."""


def merge_symbols(symbols: list[Any], merge: Merge, rate: float, random: Random) -> list[Any]:
    """Merge neighbouring symbols until nothing merges (or everything that would is dropped).

    Args:
        symbols: a word's smallest symbols: ids or strings, of one type.
        merge: the merge table. Of equal priorities the leftmost goes first.
        rate: probability with which each possible merge is left out of each step, from 0 to 1.
        random: decides what is dropped; not used at rate 0.

    Returns:
        the symbols of the merged word.
    """
    symbols = list(symbols)
    after = [*range(1, len(symbols)), -1] if symbols else []  # index of the right neighbour, -1 at the end
    before = list(range(-1, len(symbols) - 1))
    alive = [True] * len(symbols)
    queue: list[tuple[float, int, int, Any, Any, Any]] = []

    def propose(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (found := merge(symbols[left], symbols[right])) is not None:
            heapq.heappush(queue, (found[0], left, right, symbols[left], symbols[right], found[1]))

    for position in range(len(symbols) - 1):
        propose(position, position + 1)
    dropped = []
    while queue:
        entry = heapq.heappop(queue)
        _, left, right, left_symbol, right_symbol, merged = entry
        current = alive[left] and after[left] == right
        if not current or symbols[left] != left_symbol or symbols[right] != right_symbol:
            continue  # an earlier merge took one of the two
        if rate > 0 and random.random() < rate:
            dropped.append(entry)
            continue
        symbols[left], alive[right], after[left] = merged, False, after[right]
        if after[left] >= 0:
            before[after[left]] = left
        for entry in dropped:  # what this step dropped may be drawn in the next
            heapq.heappush(queue, entry)
        dropped.clear()
        propose(before[left], left)
        propose(left, after[left])
    return [symbol for symbol, kept in zip(symbols, alive, strict=True) if kept]
