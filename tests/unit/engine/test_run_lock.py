"""One job at a time in a run's folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megarq.engine.run_lock import RunLock
from megarq.errors import FaultError

HOLD = """
import sys, time
from pathlib import Path
from megarq.engine.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def holder(run: Path, seconds: float) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, run, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_another_process_is_named_and_waited_for(tmp_path):
    other = holder(tmp_path, 60)
    try:
        with pytest.raises(FaultError, match=rf"is being trained into by .*{other.pid}.*give another --output"):
            RunLock(tmp_path).take(patience=0.1)
    finally:
        other.kill()
        other.wait()
    RunLock(tmp_path).take(patience=5)  # the kernel takes it from the dead


def test_it_is_free_when_it_is_released(tmp_path):
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()
    other = holder(tmp_path, 0.5)
    lock.take(patience=20)
    other.wait()
    assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    lock.release()
