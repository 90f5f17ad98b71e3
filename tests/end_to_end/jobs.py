"""Training by its real command on two ranks, followed while it runs, and started again and again."""

import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from tests.end_to_end.commands import start_ranks

RANKS = 2
PATIENCE = 120
"""Seconds for whatever a test waits for."""


class Job:
    """A command's ranks, running."""

    def __init__(self, ranks: list[BaseProcess], log: Path) -> None:
        self.ranks, self._log = ranks, log

    @property
    def running(self) -> bool:
        return any(rank.is_alive() for rank in self.ranks)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Look again and again; an error where the job ends before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.running and time.monotonic() < deadline, f"waited in vain:\n{self.said}"
            time.sleep(0.001)

    def statuses(self) -> list[int | None]:
        """Wait for the end of all ranks, as a launcher does that leaves them alone."""
        for rank in self.ranks:
            rank.join(PATIENCE)
        return [rank.exitcode for rank in self.ranks]


class Training(NamedTuple):
    """The same training again and again, in one folder after the other."""

    options: list[str]
    folder: Path
    started: list[Job]

    def start(self, run: Path, *changes: object) -> Job:
        """Start or go on with a run."""
        log = self.folder / f"log{len(self.started)}"
        arguments = ["--ds_config", "zero1.json", *self.options, "--output", run, *changes]
        self.started.append(Job(start_ranks("megarq/train.py", *arguments, ranks=RANKS, log=log), log))
        return self.started[-1]

    def finish(self, run: Path, *changes: object) -> Job:
        """Go on with a run to its end."""
        job = self.start(run, *changes)
        assert job.statuses() == [0] * RANKS, job.said
        return job

    def end(self) -> None:
        """Kill whatever still runs."""
        for job in self.started:
            for rank in job.ranks:
                rank.kill()
