"""One job at a time trains into a run's folder."""

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from megarq.errors import RunHeldError
from megarq.files import NO_LOCKS

LOCK = ".lock"
PATIENCE = 10.0
"""Seconds for a job before this one to end."""

logger = logging.getLogger(__name__)


class RunLock:
    """Held by rank 0 from `take` until `release`, or the end of the process, which the kernel sees.

    It is a lock of POSIX's: loader processes, which may outlive a rank that is killed, do not inherit it.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / LOCK
        self._descriptor: int | None = None

    def take(self, patience: float = PATIENCE) -> None:
        """Raises: RunHeldError where another process holds it for longer than `patience`, in seconds."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in NO_LOCKS:
                    logger.warning("%s: no locks there (%s); nobody sees if two jobs train into it.", self._path, error)
                    os.close(descriptor)
                    return
                if time.monotonic() > deadline:
                    holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
                    os.close(descriptor)
                    raise RunHeldError(
                        f"{self._path.parent} is being trained into by {holder}. Wait for its end, or end it, or give "
                        "another --output."
                    ) from error
            time.sleep(0.2)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Let another job train into the folder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
