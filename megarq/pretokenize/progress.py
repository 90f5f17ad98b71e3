"""The progress line of a worker: a line that changes on a terminal, a new one now and then elsewhere."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from megarq.data.faults import Faults

_SECONDS = {True: 1.0, False: 60.0}
"""Between two updates, with and without a terminal."""


class Progress:
    """`pretokenize: 12/400 shards | here 812 images/s, 3 bad | eta 1:02:07`; the shards are those of all workers."""

    def __init__(self, faults: Faults, done: Callable[[], int], total: int, quiet: bool) -> None:
        """faults: of this worker, whose images/s and bad samples are shown; done: counts finished shards."""
        self._faults, self._done, self._total, self._quiet = faults, done, total, quiet
        self._terminal = sys.stderr.isatty()
        self._done_before, self._seen_before = done(), faults.seen
        self._start = self._shown = time.monotonic()

    def show(self, last: bool = False) -> None:
        """Show where things stand, if the last time is long enough ago or this is the last."""
        now = time.monotonic()
        if self._quiet or (not last and now - self._shown < _SECONDS[self._terminal]):
            return
        self._shown = now
        line = self.line(now - self._start)
        if self._terminal:  # spaces cover what a longer line left
            print(f"\r{line:<79}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """The line after so many seconds."""
        done = self._done()
        made = done - self._done_before
        left = tqdm.format_interval(seconds / made * (self._total - done)) if made else "?"
        speed = (self._faults.seen - self._seen_before) / max(seconds, 1e-9)
        bad = self._faults.skipped
        return f"pretokenize: {done}/{self._total} shards | here {speed:,.0f} images/s, {bad} bad | eta {left}"
