"""Gathering over a store, by threads that play ranks."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from megarq.launch.gather import Gather, over_store


def on_ranks(size: int, work: Callable[[int, Gather], Any]) -> list[Any]:
    store = dist.HashStore()
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(lambda rank: work(rank, over_store(store, rank, size)), range(size)))


def test_every_rank_learns_all_values_in_order():
    values = [{"host": "node1"}, 2.5, None]
    assert on_ranks(3, lambda rank, gather: gather(values[rank])) == [values] * 3


def test_one_gather_follows_another():
    seen = on_ranks(2, lambda rank, gather: [gather(10 * turn + rank) for turn in range(5)])
    assert seen == [[[10 * turn, 10 * turn + 1] for turn in range(5)]] * 2


def test_a_rank_alone_learns_its_own():
    assert on_ranks(1, lambda rank, gather: gather("mine")) == [["mine"]]


def test_rank_zero_whose_store_it_is_leaves_last():
    left: list[int] = []

    class Watched(dist.HashStore):
        def wait(self, *given: Any) -> None:
            super().wait(*given)
            left.append(self.add("gather/0/read", 0))

    store = Watched()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda rank: over_store(store, rank, 2)(rank), range(2)))
    assert left == [2]
