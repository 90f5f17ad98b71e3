"""Where shards come from: local files, `pipe:` commands, and http(s), s3, gs and whatever else fsspec knows.

webdataset's own openers are not used: they run curl or gsutil, and neither tell a passing failure from a lasting one
nor say what failed.
"""

import fnmatch
import hashlib
import io
import logging
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from megarq.errors import DataError

logger = logging.getLogger(__name__)

_BUFFER = 2**20
"""Bytes read at once."""
_PASSING = (408, 425, 429)
"""The 4xx answers of a server that another try may change."""


class SourceError(OSError):
    """A source failed in a way that another try may mend."""


@dataclass(frozen=True)
class Retry:
    """How often a flaky source is tried, with waits that double."""

    attempts: int = 5
    """Failures in a row that end it."""
    first_wait: float = 1.0
    """Seconds before the second attempt."""
    wait: Callable[[float], object] = time.sleep
    """What waits so many seconds."""

    def after(self, failures: int, source: str, error: Exception) -> None:
        """Log failure number `failures` and wait. Raises: DataError where it was the last that is accepted."""
        if failures >= self.attempts:
            raise DataError(
                f"shard {source!r} failed {failures} times in a row (last: {error}). "
                "Check the address, the command and the network; then run again."
            ) from error
        seconds = self.first_wait * 2 ** (failures - 1)
        logger.warning("%s failed (%s): attempt %d in %g s", source, error, failures + 1, seconds)
        self.wait(seconds)


def is_local(source: str) -> bool:
    """Whether a source is a path of this machine, neither a command nor an address."""
    return not source.startswith("pipe:") and "://" not in source


def source_name(source: str) -> str:
    """The name by which manifests know a source: the last two parts of a path or an address, such as `cc3m/00000.tar`.

    The file name alone does not tell img2dataset's data sets apart. A query and the text of a `pipe:` may hold secrets:
    a hash stands for them.
    """
    if source.startswith("pipe:"):
        return "pipe:" + _hash(source)
    path, mark, query = (str(Path(source).absolute()), "", "") if is_local(source) else source.partition("?")
    return "/".join(path.strip("/").split("/")[-2:]) + (mark and mark + _hash(query))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def local_size(source: str) -> int:
    """Bytes of a local file; 0 where it is missing, or the source is not local."""
    return Path(source).stat().st_size if is_local(source) and Path(source).is_file() else 0


def open_source(source: str) -> AbstractContextManager[BinaryIO]:
    """A source as a stream to read from its beginning. A `pipe:` is run by the shell, an address read through fsspec.

    Opening and reading raise SourceError where another try may help: a connection lost, a server out of order, a
    command with an exit status other than 0 (the error ends in what it printed). Raises: DataError where it will not:
    a missing file, no permission, a package that is not installed.
    """
    if source.startswith("pipe:"):
        return _open_pipe(source)
    return _open_file(source)


@contextmanager
def _open_file(source: str) -> Iterator[BinaryIO]:
    try:
        file = _open(source)
    except DataError:
        raise
    except Exception as error:
        raise failure(source, error) from error
    with file:
        yield _stream(source, file.read)


def _open(source: str) -> Any:
    if is_local(source):
        return Path(source).open("rb", buffering=0)
    if not source.startswith(("http://", "https://")):
        system, path = _file_system(source)
        return system.open(path, "rb")
    system, path = _file_system(source, client_kwargs=_patient())
    # One plain GET: not all servers answer HEAD or read ranges. A size given, fsspec does not ask for it.
    return system.open(path, "rb", block_size=0, size=1)


def _patient() -> dict[str, Any]:
    try:
        import aiohttp
    except ImportError:
        return {}  # fsspec says what to install
    # aiohttp would end any request after five minutes, but a reader may take as long as it likes over a shard.
    return {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=60)}


def _file_system(source: str, **options: Any) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(source, **options)
    except ImportError as error:
        package = getattr(error.__cause__ or error, "name", None) or "the package that it names"
        raise DataError(f"shard {source!r} needs a package ({error}). Run pip install {package}.") from error
    except ValueError as error:
        raise DataError(
            f"shard {source!r} has an unknown kind of address ({error}). Check what precedes ://."
        ) from error


@contextmanager
def _open_pipe(source: str) -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            source.removeprefix("pipe:"),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=printed,
            bufsize=0,
            process_group=0,  # of its own, so that all of a pipeline can be ended
        )
        output = process.stdout
        assert output is not None

        def read(size: int) -> bytes:
            data = output.read(size)
            if not data and process.wait():
                printed.seek(max(0, printed.seek(0, os.SEEK_END) - 500))
                text = printed.read().decode(errors="replace").strip()
                missing = process.returncode in (126, 127)  # the shell found no such command
                raise (FileNotFoundError if missing else OSError)(f"exit status {process.returncode}: {text}")
            return data

        with process:
            try:
                yield _stream(source, read)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


def _stream(source: str, read: Callable[[int], bytes]) -> BinaryIO:
    return io.BufferedReader(_Raw(source, read), _BUFFER)


class _Raw(io.RawIOBase):
    """What a function reads; an error of whatever library comes out as DataError or SourceError."""

    def __init__(self, source: str, read: Callable[[int], bytes]) -> None:
        self._source, self._read = source, read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._read(len(buffer))
        except Exception as error:
            raise failure(self._source, error) from error
        buffer[: len(data)] = data
        return len(data)


def failure(source: str, error: Exception) -> DataError | SourceError:
    """What to raise for an error met in opening, reading or listing a source."""
    reason = f"{type(error).__name__}: {error}"
    status = getattr(error, "status", None) or getattr(error, "code", None)
    lasting = isinstance(status, int) and 400 <= status < 500 and status not in _PASSING
    if isinstance(error, FileNotFoundError):
        return DataError(f"missing shard {source!r} ({reason}). Check the path, or the range of the pattern.")
    if lasting or is_local(source) or isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError):
        return DataError(f"shard {source!r} cannot be read ({reason}). Check the path and your permissions.")
    return SourceError(reason)


def list_remote(pattern: str, retry: Retry | None = None) -> list[str]:
    """The addresses that match, sorted; `*` may stand in the last part of `pattern`.

    Raises: DataError where the folder is missing or cannot be listed.
    """
    retry, failures = retry or Retry(), 0
    folder, _, last = pattern.rpartition("/")
    while True:
        try:
            system, path = _file_system(folder + "/")
            names = [system.unstrip_protocol(name) for name in system.ls(path, detail=False)]
            return sorted(name for name in names if fnmatch.fnmatchcase(name.rpartition("/")[2], last))
        except DataError:
            raise
        except Exception as error:
            problem = failure(pattern, error)
            if isinstance(problem, DataError):
                raise problem from error
            failures += 1
            retry.after(failures, pattern, problem)
