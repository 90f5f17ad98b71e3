"""Being asked to stop: by SIGTERM or SIGUSR1, before a time limit, a preemption or a shutdown.

A handler only takes a note; who trains looks at it between two steps, agrees with the other ranks, and saves.
"""

import signal
from types import FrameType

STOPPED = 75
"""Exit status of a run that stopped as asked, with everything saved: sysexits' EX_TEMPFAIL, "try again later"."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_received: list[str] = []


def listen() -> None:
    """Take note of these signals from now on, in place of dying by them; call it before the long imports."""
    _received.clear()
    for number in SIGNALS:
        signal.signal(number, _note)


def asked_to_stop() -> str | None:
    """The first signal that came, by name, or None."""
    return _received[0] if _received else None


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)
