"""Trying collectives before they are needed: is a sum right, how fast is it, and which rank is slow.

Every function is collective over the group that it is given, None being all ranks. Bandwidth is nccl-tests' "bus
bandwidth": what each rank's link carries in an all_reduce of S bytes over n ranks, 2 (n - 1) / n * S, per second; so it
can be held against the hardware's, for any n.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

_KNOWN, _PERIOD = 4096, 13
_REPEATS, _LATENCY_REPEATS = 5, 11


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sum_is_right(group: ProcessGroup | None, place: int, size: int, device: torch.device) -> bool:
    """Whether this rank, number `place` of `size`, receives the right sum of integers that are known."""
    pattern = torch.arange(_KNOWN, device=device) % _PERIOD + 1
    own = (pattern * (place % _PERIOD + 1)).float()
    dist.all_reduce(own, group=group)
    expected = pattern * sum(other % _PERIOD + 1 for other in range(size))  # below 2 ** 24: exact in fp32
    return bool(torch.equal(own.long(), expected))


def all_reduce_seconds(group: ProcessGroup | None, count: int, device: torch.device) -> list[float]:
    """Seconds of all_reduces of `count` fp32 numbers, one after the other; a rank that comes early waits in its own."""
    numbers = torch.zeros(count, device=device)
    return _timed(lambda: dist.all_reduce(numbers, group=group), device, _REPEATS if count > 1 else _LATENCY_REPEATS)


def bus_bandwidth(count: int, size: int, seconds: float) -> float:
    """GB/s of an all_reduce of `count` fp32 numbers over `size` ranks."""
    return 2 * (size - 1) / size * 4 * count / seconds / 1e9


def typical(seconds: list[list[float]]) -> float:
    """Of what ranks measured together, [ranks][repeats]: the last to come to each repeat did not wait in it."""
    return median(min(repeat) for repeat in zip(*seconds, strict=True))


def exchange_with_neighbours(count: int, device: torch.device) -> tuple[float, bool]:
    """Seconds in which `count` fp32 numbers come from the rank before and go to the one behind; whether they are right.

    All ranks do it at once, each for itself: a slow rank or link shows on the ranks at its ends alone.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    before, behind = (rank - 1) % size, (rank + 1) % size
    own, received = torch.full((count,), float(rank), device=device), torch.empty(count, device=device)

    def exchange() -> None:
        operations = [dist.P2POp(dist.isend, own, behind), dist.P2POp(dist.irecv, received, before)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    seconds = median(_timed(exchange, device, _REPEATS))
    return seconds, bool((received == before).all())


def _timed(action: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each repeat, after one that is not counted: connections and buffers are made in it."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]
