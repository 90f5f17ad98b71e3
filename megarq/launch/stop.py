"""Being asked to stop: by SIGTERM or SIGUSR1, before a time limit, a preemption or a shutdown, or by Ctrl-C.

A handler only takes a note; who trains looks at it between two steps, agrees with the other ranks, and saves. Before
the first step Ctrl-C ends a command at once, and so it does the second time.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = 75
"""Exit status of a run that stopped as asked, with everything saved: sysexits' EX_TEMPFAIL, "try again later"."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
AGAIN = 2.0
"""Seconds after which another SIGINT is another Ctrl-C."""

_received: list[str] = []


def listen() -> None:
    """Take note of these signals from now on, in place of dying by them; call it before the long imports."""
    _received.clear()
    for number in SIGNALS:
        signal.signal(number, _note)


def asked_to_stop() -> str | None:
    """The first signal that came, by name, or None."""
    return _received[0] if _received else None


@contextmanager
def interrupts_noted() -> Iterator[None]:
    """Take note of SIGINT too, once, while the body runs; launchers send it a second time, at once, themselves."""
    first: list[float] = []

    def interrupted(number: int, frame: FrameType | None) -> None:
        if first and time.monotonic() - first[0] > AGAIN:
            raise KeyboardInterrupt
        first.append(time.monotonic())
        _note(number, frame)

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)
