"""Disks that are full."""

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def little_space(folder: Path, size: int) -> Iterator[None]:
    """A full disk at `folder`: a small one of its own where we may mount it, else a limit on the size of files."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield
            subprocess.run(["mount", "-o", "remount,size=16m", str(folder)], check=True)
        except BaseException:
            subprocess.run(["umount", str(folder)], check=True)
            raise
    else:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 4, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
