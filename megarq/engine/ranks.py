"""What ranks tell each other after every step: their times and memory, what is wrong, whether they were asked to stop.

Whatever makes a run skip, stop or go back is decided by what was exchanged, so that all ranks decide alike.
"""

import socket
import time
from collections.abc import Iterable
from statistics import median_low
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megarq.config.faults import FaultConfig
from megarq.parallel.measure import synchronize
from megarq.parallel.together import gather_objects

_WAITING_SHARE, _WAITING_STEPS = 0.5, 10
"""A rank that waits for data for more than this share of so many steps in a row is told of."""
_SLOW_PROBES = 2
"""So is one whose probe was slow so many times in a row."""
_PROBE = {"cpu": (256, 8), "cuda": (4096, 8)}
"""Rows of the square matrices that a probe multiplies, and how often."""


class RankReport(NamedTuple):
    """One rank's step."""

    step_seconds: float
    data_seconds: float
    """Of the step, waiting for the loader."""
    memory_gib: float
    probe_seconds: float
    """Of the last probe; 0 before there was one."""
    loss: float
    """The mean that is minimised."""
    bad: float
    """1 where a loss or the gradient's norm is not finite."""
    stop: float
    """1 where the rank was asked to stop."""
    failed: float
    """1 where the checkpoint that is being written has failed on the rank."""


class Ranks:
    """The exchange, and who is slow."""

    def __init__(self, config: FaultConfig, device: torch.device) -> None:
        """Every rank of the default process group makes the same calls."""
        self._config, self._device = config, device
        self._hosts = gather_objects(socket.gethostname())
        self._probe_seconds = 0.0
        self._slow, self._waiting = _Streaks(_SLOW_PROBES), _Streaks(_WAITING_STEPS)

    def exchange(
        self,
        step: int,
        *,
        step_seconds: float,
        data_seconds: float,
        memory_gib: float,
        loss: float,
        bad: bool,
        stop: bool,
        failed: bool,
    ) -> tuple[list[RankReport], list[str]]:
        """All ranks' numbers of this step, in order of rank, and warnings about those that are slow (collective)."""
        probing = self._config.probe_every > 0 and step % self._config.probe_every == 0
        if probing:
            self._probe_seconds = probe(self._device)
        own = RankReport(step_seconds, data_seconds, memory_gib, self._probe_seconds, loss, bad, stop, failed)
        rows = torch.empty(len(self._hosts), len(own), dtype=torch.float64, device=self._device)
        dist.all_gather_into_tensor(rows, torch.tensor([own], dtype=rows.dtype, device=self._device))
        ranks = [RankReport(*row) for row in rows.tolist()]
        return ranks, [*self._who_waits(ranks), *(self._who_is_slow(ranks) if probing else ())]

    def _who_waits(self, ranks: list[RankReport]) -> list[str]:
        waiting = [rank for rank, it in enumerate(ranks) if it.data_seconds > _WAITING_SHARE * it.step_seconds]
        return [
            f"{self._named(rank)} waited for data in {ranks[rank].data_seconds:.2f} s of its step of "
            f"{ranks[rank].step_seconds:.2f} s, and so for {_WAITING_STEPS} steps; raise data.workers, or look at its "
            "storage"
            for rank in self._waiting.reached(waiting)
        ]

    def _who_is_slow(self, ranks: list[RankReport]) -> list[str]:
        usual = median_low(it.probe_seconds for it in ranks)
        slow = [rank for rank, it in enumerate(ranks) if it.probe_seconds > self._config.slow_factor * usual]
        return [
            f"{self._named(rank)} is slow: a product of matrices takes it {ranks[rank].probe_seconds * 1e3:.3g} ms, "
            f"{usual * 1e3:.3g} are the median of the ranks; look at its clocks, its heat, and what else runs there"
            for rank in self._slow.reached(slow)
        ]

    def _named(self, rank: int) -> str:
        return f"rank {rank} ({self._hosts[rank]})"


class _Streaks:
    """How many times in a row each rank was found."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._found: dict[int, int] = {}

    def reached(self, ranks: Iterable[int]) -> list[int]:
        """Of these ranks, found once more, those whose streak has just reached the length; others' streaks end."""
        self._found = {rank: self._found.get(rank, 0) + 1 for rank in ranks}
        return [rank for rank, times in self._found.items() if times == self._length]


def probe(device: torch.device) -> float:
    """Seconds that this rank alone takes for some fixed work; what it takes for a step is the others' doing too."""
    size, count = _PROBE[device.type]
    matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    product = matrix @ matrix  # the first of a size may have to choose its kernel
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        product = matrix @ matrix
    synchronize(device)
    del product
    return time.perf_counter() - start


def summary(ranks: list[RankReport]) -> dict[str, Any]:
    """For every step's metrics: the slowest rank's times, and which it is."""
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank].probe_seconds)
    return {
        "step_seconds": max(it.step_seconds for it in ranks),
        "data_seconds": max(it.data_seconds for it in ranks),
        "memory_gib": max(it.memory_gib for it in ranks),
        **({"slowest_rank": slowest} if ranks[slowest].probe_seconds else {}),
    }


def by_rank(ranks: list[RankReport]) -> dict[str, list[float]]:
    """For some steps' metrics: everybody's times, in order of rank."""
    names = ("step_seconds", "data_seconds", "memory_gib", "probe_seconds")
    return {f"ranks_{name}": [round(getattr(it, name), 5) for it in ranks] for name in names}
