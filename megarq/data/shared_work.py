"""Files of one folder made by workers that share nothing but the folder: who makes which, by locks, and in which order.

A worker makes `000003.tar` only while it holds the lock on `.000003.tar.lock`. The kernel takes a lock away from a
process that dies, on whatever host, so that the next worker to come by makes the file again.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from megarq.errors import DataError
from megarq.files import NO_LOCKS


@contextmanager
def locked(folder: Path, file: str, wait: bool = False) -> Iterator[bool]:
    """Whether this worker has `file` to itself while the body runs.

    Raises: DataError on a file system without locks, or where the folder cannot be written.
    """
    lock = FileLock(folder / f".{file}.lock", fallback_to_soft=False)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise DataError(
                f"{folder} lies on a file system without locks ({error}). Choose an --output "
                "elsewhere, or mount it with locks (Lustre: -o flock)."
            ) from error
        raise DataError(
            f"{lock.lock_file} cannot be locked ({error}). Check the folder's rights and free space."
        ) from error
    try:
        yield True
    finally:
        lock.release()


def take_files(
    folder: Path,
    files: Sequence[str],
    is_done: Callable[[int], bool],
    number: int,
    workers: int,
    but: Iterable[int] = (),
) -> Generator[int, None, None]:
    """Places in `files` for one worker to make, each locked until the next is asked for; close it where it is not
    exhausted.

    Worker r of n takes files r, r + n, ... and then what nobody holds, from the ends of the others' shares, which they
    reach last. At the end every file is done, taken, or held by another worker; those of `but` are left out.
    is_done: asked under the lock, since somebody may have made the file while this worker was busy.
    Raises: DataError on a file system without locks.
    """
    left_out = set(but)
    waiting = [index for index in _order(len(files), number, workers) if index not in left_out]
    while waiting:
        held = []
        for index in waiting:
            with locked(folder, files[index]) as mine:
                if not mine:
                    held.append(index)
                elif not is_done(index):
                    yield index
        if held == waiting:
            return
        waiting = held


def _order(count: int, number: int, workers: int) -> list[int]:
    """All places, in the order in which a worker should ask for them."""
    shares = [range(worker % workers, count, workers) for worker in range(number, number + workers)]
    return [*shares[0], *(index for share in shares[1:] for index in reversed(share))]


def remove_leftovers(folder: Path, files: Iterable[str]) -> None:
    """Remove locks and killed workers' half files, but for those of files that somebody is making."""
    for file in files:
        with locked(folder, file) as mine:
            if mine:
                (folder / f".{file}.tmp").unlink(missing_ok=True)
                (folder / f".{file}.lock").unlink(missing_ok=True)
