"""Batches, or parts of them, by number, made in this process or by workers, and always handed over in order."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megarq.errors import DataError, MegarqError

Batch = TypeVar("Batch")


class _Numbered(Dataset[Batch | MegarqError]):
    """Items made by a function of their number; an error travels as a value, to be raised unchanged."""

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self._make = make

    def __getitem__(self, number: int) -> Batch | MegarqError:
        try:
            return self._make(number)
        except MegarqError as error:
            return error


class _Numbers(Sampler[int]):
    """0, 1, 2 ... up to `stop`, or without end."""

    def __init__(self, stop: int | None) -> None:
        self._stop = stop

    def __iter__(self) -> Iterator[int]:
        return iter(count()) if self._stop is None else iter(range(self._stop))


def _leave_signals_to_the_parent(worker: int) -> None:
    """SLURM and launchers signal all processes of a rank, which still needs its workers to finish a step and save.

    SIGTERM from the parent itself ends the worker. Processes that it starts, `pipe:` ones, ignore the signals too.
    """
    left = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, left)

    def follow() -> None:
        while True:
            received = signal.sigwaitinfo(left)
            if received.si_pid == os.getppid() and received.si_signo == signal.SIGTERM:
                os._exit(0)

    threading.Thread(target=follow, daemon=True).start()


def _unchanged(batch: Batch) -> Batch:
    return batch


def batches_in_order(
    make: Callable[[int], Batch], workers: int, stop: int | None = None, prefetch: int = 2
) -> Iterator[Batch]:
    """make(0), make(1), ... up to `stop` (endless by default), number i made by worker i % workers, `prefetch` ahead.

    With workers=0 the batches are made in this process. The global random state is left alone. A
    MegarqError in a worker is raised here as it is.
    """
    loader: DataLoader[Batch | MegarqError] = DataLoader(
        _Numbered(make),
        batch_size=None,
        sampler=_Numbers(stop),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_unchanged,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, MegarqError):
            raise batch
        yield batch


def check_share(global_batch_size: int, world_size: int) -> int:
    """Samples of each rank in a global batch. Raises: DataError where the ranks cannot share it equally."""
    share, rest = divmod(global_batch_size, world_size)
    if rest or share < 1:
        raise DataError(
            f"train.global_batch_size={global_batch_size} cannot be shared by {world_size} data-parallel ranks. "
            f"Use a multiple of {world_size}."
        )
    return share
