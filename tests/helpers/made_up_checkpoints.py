"""Checkpoints without an engine: tensors cut as any layout cuts them, saved by one process or by threads as ranks.

save_alone(run, 3, {"param/w": (Fragment((6, 4)), torch.ones(6, 4))}, {})
save_together(run, 3, cut("param/w", torch.ones(6, 4), dim=0, parts=2, pieces=2), {})
Ranks(4).run(lambda rank, gather: ...)      four threads; `gather` is their all-gather
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

from torch import Tensor

from megarq.checkpoint.format import Fragment
from megarq.checkpoint.run_folder import alone
from megarq.checkpoint.writer import CheckpointWriter
from megarq.config.run import CheckpointConfig
from megarq.launch.gather import Gather
from megarq.parallel.topology import Topology

Fragments = Mapping[str, tuple[Fragment, Tensor]]
SECONDS_TO_MEET = 30


def save_alone(run: Path, step: int, tensors: Fragments, metadata: Mapping[str, Any], keep: int = 0) -> Path:
    """Save a step from one process; returns its folder."""
    with CheckpointWriter(run, CheckpointConfig(keep=keep), Topology(), step - 1, gather=alone) as writer:
        writer.save(step, tensors, metadata)
    return run / "checkpoints" / f"step-{step:08d}"


def save_together(run: Path, step: int, held: Sequence[Fragments], metadata: Mapping[str, Any]) -> Path:
    """Save a step from as many ranks as there are sets of fragments; returns its folder."""

    def save(rank: int, gather: Gather) -> None:
        config = CheckpointConfig(keep=0, asynchronous=False)
        with CheckpointWriter(run, config, Topology(len(held), rank), step - 1, gather=gather) as writer:
            writer.save(step, held[rank], metadata)

    outcomes = Ranks(len(held)).run(save)
    assert outcomes == [None] * len(held), outcomes
    return run / "checkpoints" / f"step-{step:08d}"


def cut(key: str, whole: Tensor, dim: int, parts: int, pieces: int) -> list[dict[str, tuple[Fragment, Tensor]]]:
    """What each of `parts` x `pieces` ranks holds of a tensor: ZeRO's ranges of tensor parallelism's slices."""
    ranks = []
    for part in range(parts):
        flat = whole.chunk(parts, dim)[part].reshape(-1)
        size = math.ceil(flat.numel() / pieces)
        for start in range(0, size * pieces, max(size, 1)):
            numbers = flat[start : start + size]
            held = {key: (Fragment(tuple(whole.shape), dim, part, parts, start), numbers)} if numbers.numel() else {}
            ranks.append(held)
    return ranks


class Ranks:
    """Threads that play ranks."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._met = Barrier(size)
        self._values: list[Any] = [None] * size

    def run(self, work: Callable[[int, Gather], Any]) -> list[Any]:
        """What `work(rank, gather)` returns on each rank, or the exception it raises."""
        with ThreadPoolExecutor(self._size) as threads:
            futures = [threads.submit(work, rank, self._gather_of(rank)) for rank in range(self._size)]
            return [future.exception() or future.result() for future in futures]

    def _gather_of(self, rank: int) -> Gather:
        def gather(value: Any) -> list[Any]:
            self._values[rank] = value
            self._met.wait(SECONDS_TO_MEET)
            values = list(self._values)
            self._met.wait(SECONDS_TO_MEET)
            return values

        return gather
