"""Blocks of code shards that this process cannot read any more, and what stands in for their samples.

    a read fails    the file is missing, cut or refused    tried again for up to `data.retry_seconds`, then lost whole
                    a row differs from its checksum         read once more, then its block is lost

A lost block stays lost for the process: storage that comes and goes must not stall every batch. For the same reason
nothing is waited for within ten times `retry_seconds` after a file was lost. Each process finds out for itself.
"""

import logging
import socket
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from megarq.data.code_shards import ShardError
from megarq.data.order import IntArray, hash_array

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_SECONDS = 30.0
FIRST_PAUSE = 0.5
"""Seconds; each pause is twice as long as the one before."""
CALM = 10
"""Times `retry_seconds` after a loss in which nothing is waited for."""


class LostBlocks:
    """Which blocks are lost, found out by reading."""

    def __init__(self, blocks: int, retry_seconds: float = RETRY_SECONDS) -> None:
        """blocks: how many there are; retry_seconds: how long a file is waited for."""
        self.mask: npt.NDArray[np.bool_] = np.zeros(blocks, np.bool_)
        """[blocks] whether each is lost."""
        self.news: list[str] = []
        """What was lost since somebody emptied this list: where, and why."""
        self._retry_seconds = retry_seconds
        self._calm_until = -np.inf

    def add(self, blocks: IntArray) -> None:
        """These are known to be lost; nobody waits for them."""
        self.mask[blocks] = True

    def read(self, action: Callable[[], T]) -> T | None:
        """What a read gives; None where blocks that it needs are lost now."""
        start, pause, again = time.monotonic(), FIRST_PAUSE, False
        while True:
            try:
                return action()
            except ShardError as error:
                left = start + self._retry_seconds - time.monotonic()
                if error.passing and left > 0 and time.monotonic() >= self._calm_until:
                    logger.warning("%s Trying again for %.1f s.", error, left)
                    time.sleep(min(pause, left))
                    pause *= 2
                elif not error.passing and not again:
                    again = True
                else:
                    self._lose(error)
                    return None

    def _lose(self, error: ShardError) -> None:
        if error.passing:
            self._calm_until = time.monotonic() + CALM * self._retry_seconds
        if not self.mask[error.blocks].all():
            self.mask[error.blocks] = True
            self.news.append(f"{socket.gethostname()}: {error}")


def stand_ins(block: IntArray, row: IntArray, epoch: IntArray, sizes: IntArray, *key: int) -> tuple[IntArray, IntArray]:
    """[n] samples -> (block [n], row [n]) of others, drawn from all; a function of the sample, its epoch and the key.

    sizes: [blocks] samples of each block.
    """
    ends = np.cumsum(sizes)
    hashes = hash_array(hash_array(hash_array(block, *key) ^ row.astype(np.uint64)) ^ epoch.astype(np.uint64))
    number = (hashes % np.uint64(ends[-1])).astype(np.int64)
    chosen = np.searchsorted(ends, number, side="right")
    return chosen, number - (ends - sizes)[chosen]
