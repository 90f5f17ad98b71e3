"""Ending a run that hangs, and saying where: each rank's watchdog looks after its own main thread.

    main thread   every rank   mark("step 12: forward and backward"), mark("step 12: ranks meet"), ...
    watchdog      each rank    no new mark for `seconds`: RUN/hangs/rank-00003.json, and .txt with all threads' stacks;
                               wait for the others' reports, then end the process with status 76, however long the
                               file system takes for them
                  one rank     says which rank hangs, in what step, and in which collective the others wait for it

Nothing is sent while all goes well, and nothing at all through the process group, which may be what hangs. A rank
without a report is stopped or dead, or its host is.
"""

import faulthandler
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from megarq.files import write_atomically

HANGS, BEFORE = "hangs", "hangs.before"
"""Reports of this start, and of the last one that hung."""
HUNG = 76
"""Exit status of a rank whose watchdog ended it."""
_OURS = str(Path(__file__).parents[1]) + os.sep
SLOWER = 10
"""Times the patience that is right for a step, for what takes longer than steps."""
SUSPENDED = 2.0
"""Seconds that this thread oversleeps where the whole process was stopped, as a scheduler does: they do not count."""
GRACE = 5.0
"""Seconds that reports of other ranks are waited for."""


@dataclass
class Report:
    """Where a rank's main thread stood when its watchdog gave it up."""

    rank: int
    host: str
    step: int
    marks: int
    """Marks since the start: of two ranks, the one with fewer is behind."""
    doing: str
    """The last mark."""
    seconds: float
    """Since that mark."""
    collective: str | None
    """Of torch.distributed, where the thread stands in one."""
    line: str
    """Of our code, the innermost on the stack."""


class Watchdog:
    """Watches this process's main thread; as a context, from entry to exit."""

    def __init__(
        self, run: Path, rank: int, world_size: int, seconds: float, tell: Callable[[int, str], object]
    ) -> None:
        """Watch after the first mark; never where `seconds` is 0.

        Args:
            run: the run's folder, which all ranks see.
            rank: this rank, of `world_size`.
            seconds: without a mark after which the process is ended.
            tell: what the one rank that speaks for all does with the step and its sentence, besides printing it.
        """
        self._folder = run / HANGS
        self._rank, self._world_size, self._seconds, self._tell = rank, world_size, seconds, tell
        self._main = threading.get_ident()
        self._step, self._marks, self._doing = 0, 0, ""
        self._since, self._patience = time.monotonic(), float("inf")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @classmethod
    def none(cls) -> "Watchdog":
        """One that never watches."""
        return cls(Path(), 0, 1, 0, lambda step, verdict: None)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            if self._rank == 0 and self._folder.exists():
                before = self._folder.with_name(BEFORE)
                shutil.rmtree(before, ignore_errors=True)
                with suppress(OSError):
                    self._folder.rename(before)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Watch no more; where it is ending the process already, this never returns."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def mark(self, step: int, doing: str, times: float = 1) -> None:
        """The main thread goes on: with this, which may take `times` as long as what is usual."""
        self._step, self._marks, self._doing = step, self._marks + 1, doing
        self._since, self._patience = time.monotonic(), times * self._seconds

    def _watch(self) -> None:
        pause = min(1.0, self._seconds / 10)
        woke = time.monotonic()
        while not self._closed.wait(pause):
            now = time.monotonic()
            if now - woke > pause + SUSPENDED:
                self._since = min(now, self._since + now - woke - pause)
            woke = now
            if now - self._since > self._patience:
                last = threading.Timer(4 * GRACE, os._exit, (HUNG,))
                last.daemon = True
                last.start()
                try:
                    self._end()
                finally:
                    os._exit(HUNG)

    def _end(self) -> None:
        report = self._report()
        name = f"rank-{self._rank:05d}"
        print(
            f"rank {self._rank}: no progress for {report.seconds:.0f} s in {_where(report)}; the stacks are in "
            f"{self._folder / name}.txt",
            file=sys.stderr,
            flush=True,
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"{name}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        write_atomically(self._folder / f"{name}.json", json.dumps(asdict(report)))
        reports = self._others()
        if self._rank == min(other.rank for other in reports):
            verdict = f"HANG: {judge(reports, self._world_size)}"
            print(verdict, file=sys.stderr, flush=True)
            self._tell(self._step, verdict)

    def _report(self) -> Report:
        collective, line = stands_in(sys._current_frames()[self._main])
        seconds = time.monotonic() - self._since
        return Report(self._rank, socket.gethostname(), self._step, self._marks, self._doing, seconds, collective, line)

    def _others(self) -> list[Report]:
        """All reports, once they are complete or none may come any more."""
        deadline = time.monotonic() + GRACE
        while True:
            paths = sorted(self._folder.glob("rank-*.json"))
            if len(paths) >= self._world_size or time.monotonic() > deadline:
                return [Report(**json.loads(path.read_text())) for path in paths]
            time.sleep(0.1)


def judge(reports: list[Report], world_size: int) -> str:
    """Which rank hangs, in what step, and where the others wait for it."""
    silent = sorted(set(range(world_size)) - {report.rank for report in reports})
    last = max(reports, key=lambda report: report.marks)
    if silent:
        waiting = f"the others wait in {_where(last)}"
        return f"{_ranks(silent)} gave no report in step {last.step}: stopped, or dead with its host; {waiting}."
    behind = [report for report in reports if report.marks < last.marks]
    if not behind and any(report.collective for report in reports):
        behind = [report for report in reports if report.collective is None]
    if not behind:
        return f"all ranks stand in {_where(last)}: look at the network between them."
    named = ", ".join(f"rank {report.rank} ({report.host}) in {_where(report)}" for report in behind[:5])
    more = f" and {len(behind) - 5} more" if len(behind) > 5 else ""
    others = [report for report in reports if report not in behind]
    return f"{named}{more} is behind; the others wait in {_where(others[0])}."


def stands_in(frame: FrameType | None) -> tuple[str | None, str]:
    """From a thread's stack: the collective of torch.distributed that it is in, and the innermost line of our code."""
    collective, line = None, "?"
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path.endswith("distributed_c10d.py") and line == "?":
            collective = name  # the outermost: what was called
        elif line == "?" and path.startswith(_OURS):
            line = f"{Path(path).name}:{frame.f_lineno}"
        frame = frame.f_back
    return collective, line


def _where(report: Report) -> str:
    inside = f", {report.collective}" if report.collective else ""
    return f"step {report.step}, {report.doing}{inside} ({report.line})"


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
