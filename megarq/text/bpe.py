"""Byte-pair merging with a dropout that can be seeded: the part of a tokenizer that its library keeps to itself.

Libraries offer BPE dropout (Provilkov et al. 2020, arXiv 1910.13267, algorithm 1), but draw it from a generator that
nobody can seed. Here a step looks at all merges that are possible now, drops each with probability `rate`, and applies
the best one left; when none is left, the word is done. At rate 0 that is plain BPE:
l o w e r -> lo w e r -> lo w er -> low er -> lower.

What is possible now depends on the symbols of now alone. So words that come again and again are merged from memory:
the states of a word of which nothing is dropped, and the merges of every state. `merge_symbols` and `WordMerger`
ask for the same drops in the same order.
"""

import heapq
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from math import inf, log, log1p
from random import Random
from typing import Any

Merge = Callable[[Any, Any], tuple[float, Any] | None]
"""(left, right) -> (priority, merged symbol), the lowest priority first, or None where the two do not merge."""
REMEMBERED = 2**16
"""States whose merges, and whose ways to the last state, are remembered: some 40 MB of each."""
LONGEST = 32
"""Symbols of the longest word that is: to look at all merges of every state takes time that grows with their square,
where `merge_symbols` adds only the new ones."""

State = tuple[Any, ...]
"""The symbols of a word, some of them merged."""


class Drops:
    """Says of one merge after the other whether it is dropped, each with probability `rate`, independently.

    What is drawn is how many are kept before the next is dropped, a geometric number.
    """

    def __init__(self, rate: float, random: Random) -> None:
        """`rate` from 0 to 1; the answers are a function of it and of `random`."""
        self._random = random
        self._rate = rate
        self.kept = self._draw()
        """Merges to be kept before the next that is dropped."""

    def __call__(self) -> bool:
        """Whether the next merge is dropped."""
        if self.kept:
            self.kept -= 1
            return False
        self.kept = self._draw()
        return True

    def _draw(self) -> float:
        if self._rate in (0, 1):
            return inf if self._rate == 0 else 0
        return log(1 - self._random.random()) // log1p(-self._rate)


class WordMerger:
    """`merge_symbols` with one merge table, faster for words that it has seen."""

    def __init__(self, merge: Merge) -> None:
        """`merge` must be a function of the two symbols alone."""
        self._merge = merge
        self._merges = lru_cache(REMEMBERED)(self._find_merges)
        self._path = lru_cache(REMEMBERED)(self._find_path)

    def __call__(self, symbols: State, drops: Drops) -> Sequence[Any]:
        """The symbols of the merged word."""
        if len(symbols) > LONGEST:
            return merge_symbols(symbols, self._merge, drops)
        path = self._path(symbols)
        while drops.kept < len(path) - 1:
            symbols = path[int(drops.kept)]
            drops.kept = 0
            for at, merged in self._merges(symbols):
                if not drops():
                    symbols = (*symbols[:at], merged, *symbols[at + 2 :])
                    break
            else:
                return symbols
            path = self._path(symbols)
        drops.kept -= len(path) - 1
        return path[-1]

    def _find_path(self, symbols: State) -> list[State]:
        """The states of a word of which nothing is dropped, from its smallest symbols to its last."""
        path = [symbols]
        while merges := self._merges(path[-1]):
            at, merged = merges[0]
            path.append((*path[-1][:at], merged, *path[-1][at + 2 :]))
        return path

    def _find_merges(self, symbols: State) -> tuple[tuple[int, Any], ...]:
        """All merges that are possible now, best first: (place of the left symbol, merged symbol)."""
        pairs = enumerate(pairwise(symbols))
        found = [(merge[0], at, merge[1]) for at, pair in pairs if (merge := self._merge(*pair)) is not None]
        return tuple((at, merged) for _, at, merged in sorted(found))  # no two at one place: `merged` is never compared


def merge_symbols(symbols: Sequence[Any], merge: Merge, drops: Callable[[], bool]) -> list[Any]:
    """Merge neighbouring symbols until nothing merges (or everything that would is dropped).

    Args:
        symbols: a word's smallest symbols: ids or strings, of one type.
        merge: the merge table. Of equal priorities the leftmost goes first.
        drops: asked about one possible merge after the other, whether it is left out of this step.

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
        if drops():
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
