"""Data files: lists of shards given as patterns, and writing them whole, with a checksum."""

import glob
import hashlib
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

import braceexpand

from megarq.data.sources import is_local, list_remote
from megarq.errors import DataError
from megarq.files import atomic_file

logger = logging.getLogger(__name__)


@contextmanager
def data_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears as `path` only when whole.

    Raises: DataError where the folder cannot be written or the disk is full.
    """
    try:
        with atomic_file(path) as file:
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}). Free space or choose another output folder.") from error


class HashingFile:
    """A write-only file that keeps the sha256 and length of what went through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._written = 0

    def write(self, data: bytes) -> int:
        """Write all of `data`."""
        self._sha256.update(data)
        self._written += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._written

    def hexdigest(self) -> str:
        """The sha256 of the bytes written so far."""
        return self._sha256.hexdigest()


def check_holds_pictures(source: str) -> None:
    """Raise DataError for a local path that is neither a folder nor a tar; patterns and `*.tar` are left to be read."""
    path = Path(source)
    if not is_local(source) or set(source) & set("*?[{") or source.endswith(".tar") or path.is_dir():
        return
    if not path.exists() or not tarfile.is_tarfile(path):
        what = "a file, but no tar" if path.exists() else "no such file or folder"
        raise DataError(
            f"{source}: {what}. Give a folder of pictures, image shards such as 'shards/*.tar', an LMDB or a set of "
            "drawn pictures."
        )


def local_part(pattern: str) -> Path | None:
    """The path that a pattern names, or the folder in which its `*`, `?`, `[` or `{` begins; None where not local."""
    if not is_local(pattern):
        return None
    return Path(*takewhile(lambda part: not set(part) & set("*?[{"), Path(pattern).parts))


def expand_shards(patterns: str | Sequence[str]) -> list[str]:
    """The shards that brace patterns, globs, folders, paths, addresses and `pipe:` commands name, in that order.

    `'shards/{00000..00009}.tar'` gives ten names; a folder, or an address that ends in /, gives its `*.tar`. Of what a
    glob finds, sorted, .tar files count: img2dataset puts others beside them. In an address, `*` may stand in the last
    part. Local shards must exist; whether others do shows when they are read.
    A shard named twice is listed once, with a warning.
    Raises: DataError naming the pattern that matches nothing or the shard that is missing.
    """
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    shards: list[str] = []
    for pattern in given:
        for name in _expand_braces(pattern):
            found = _find_local(name) if is_local(name) else _find_remote(name)
            if not found:
                what = "no .tar file matches" if "*" in name or glob.has_magic(name) else "missing shard"
                raise DataError(f"{what} {name!r} (from {pattern!r}). Check the path, or the range of the pattern.")
            shards.extend(found)
    if not shards:
        raise DataError("no shards given. Name tar files, for example 'shards/*.tar' or 'shards/{00000..00009}.tar'.")
    for shard, times in Counter(shards).items():
        if times > 1:
            logger.warning("shard %s is named %d times: read once", shard, times)
    return list(dict.fromkeys(shards))


def _find_local(name: str) -> list[str]:
    if Path(name).is_file():
        return [name]
    if Path(name).is_dir():
        name = str(Path(name) / "*.tar")
    return sorted(match for match in glob.glob(name) if match.endswith(".tar") and Path(match).is_file())  # noqa: PTH207


def _find_remote(name: str) -> list[str]:
    if name.startswith("pipe:"):
        return [name]
    if name.endswith("/"):
        name += "*.tar"
    if "*" not in name.partition("?")[0]:
        return [name]
    return [match for match in list_remote(name) if match.endswith(".tar")]


def _expand_braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"shard pattern {pattern!r} has unbalanced braces. Write {{00000..00009}}.tar.") from error
