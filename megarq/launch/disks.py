"""Do all hosts see the same files, and can every rank read and write where it must?

A file that no host can read is a person's to mend; one that some hosts can read is a fault of the others.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from megarq.errors import FaultError, PreflightError
from megarq.files import file_sha256
from megarq.launch.fitness import differing, named
from megarq.launch.gather import Gather

_FIRST_BYTES = 512
_TOLD = 3
"""Files that each rank tells of; the others are counted."""


def check_folder(folder: Path, rank: int, hosts: Sequence[str], gather: Gather) -> None:
    """Make the run's folder. Raises where a rank cannot write into it, or rank 0 does not find what it wrote there."""

    def mark(of: int) -> Path:
        return folder / f".preflight-{of:05d}"

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        mark(rank).write_text(token)

    token = gather(str(time.time_ns()))[0]
    problems = gather(_problem(write))
    written = [other for other, problem in enumerate(problems) if not problem]
    unseen = gather([other for other in written if not _holds(mark(other), token)] if rank == 0 else [])[0]
    _problem(lambda: mark(rank).unlink(missing_ok=True))
    refused = [other for other, text in enumerate(problems) if text]
    if len(refused) == len(hosts):
        raise PreflightError(
            f"--output {folder} cannot be written ({problems[0]}). Choose another, or mend its rights."
        )
    if refused:
        raise FaultError(
            f"{folder} cannot be written on {named(refused, hosts)} ({problems[refused[0]]}), unlike on other ranks. "
            "Start on other nodes, or mend that file system there."
        )
    if unseen:
        raise PreflightError(
            f"what is written into {folder} on {named(unseen, hosts)} does not come to {named([0], hosts)}: all ranks "
            "write a checkpoint into one folder. Give an --output on a file system that all nodes share."
        )


def check_same_files(paths: Iterable[Path], contents: bool, hosts: Sequence[str], gather: Gather) -> None:
    """Raise FaultError where what a command line names is there for some ranks and not for others, or is another.

    contents: compare files by all that is in them, and not by their size alone.
    """
    found = differing({str(path): _fingerprint(path, contents) for path in paths}, hosts, gather)
    if found is not None:
        raise FaultError(
            f"not all ranks find the same files; {found}. Start on other nodes, or mount or copy them there."
        )


def check_readable(files: Mapping[Path, int], hosts: Sequence[str], gather: Gather) -> None:
    """Open what each rank will read, and read its first bytes; `files` are this rank's, with their sizes.

    Raises FaultError where another rank can read what one cannot, PreflightError where none can.
    """
    found = ((str(path), size, _unreadable(path, size)) for path, size in files.items())
    failed = [entry for entry in found if entry[2] is not None]
    everywhere = gather([len(failed), list(islice(failed, _TOLD))])
    if not any(count for count, _ in everywhere):
        return
    path, size, problem = next(entries[0] for count, entries in everywhere if count)
    ranks = [rank for rank, (_, entries) in enumerate(everywhere) if path in (entry[0] for entry in entries)]
    most = max(count for count, _ in everywhere)
    more = f", and {most - 1} more" if most > 1 else ""
    answers = gather(_unreadable(Path(path), size))
    readers = [rank for rank, answer in enumerate(answers) if answer is None]
    text = f"{path} cannot be read on {named(ranks, hosts)} ({problem}){more}"
    if readers:
        raise FaultError(
            f"{text}; on {named(readers[:1], hosts)} it can. Start on other nodes, or mount or copy it there."
        )
    raise PreflightError(f"{text}, nor on any other rank. Copy or make it again.")


def _unreadable(path: Path, size: int) -> str | None:
    """Why a file cannot be used, or None."""
    try:
        with path.open("rb") as file:
            file.read(_FIRST_BYTES)
            found = os.fstat(file.fileno()).st_size
    except OSError as error:
        return error.strerror
    return None if found == size else f"{found} bytes in place of {size}"


def _fingerprint(path: Path, contents: bool) -> str:
    try:
        if path.is_dir():
            return "a folder"
        return f"{path.stat().st_size} bytes" + (f" of sha256 {file_sha256(path)[:12]}" if contents else "")
    except OSError as error:
        return f"missing ({error.strerror})"


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


def _problem(action: Callable[[], object]) -> str | None:
    try:
        action()
    except OSError as error:
        return error.strerror
    return None
