"""The checkpoints of a run: their names, and the newest whole one."""

import logging
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megarq.checkpoint.format import Checkpoint
from megarq.errors import CheckpointError, FaultError, is_fault
from megarq.launch.gather import Gather
from megarq.parallel.together import together

LATEST = "latest"
PAUSES = (1.0, 5.0, 25.0)
"""Seconds between attempts to read from a storage that fails."""

logger = logging.getLogger(__name__)


def checkpoints_folder(run: str | Path) -> Path:
    """RUN/checkpoints."""
    return Path(run) / "checkpoints"


def kept_checkpoints(run: str | Path) -> int:
    """How many checkpoints are in a run's folder."""
    return len(list(checkpoints_folder(run).glob("step-*")))


def space_for_checkpoints(run: str | Path) -> int:
    """Bytes free in the run's file system, with those that the next save frees: of saves that were not finished."""
    unfinished = checkpoints_folder(run).glob(".step-*/*")
    return shutil.disk_usage(run).free + sum(path.stat().st_size for path in unfinished)


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def alone(value: Any) -> list[Any]:
    """The all-gather of a single process."""
    return [value]


def newest_checkpoint(run: str | Path, rank: int = 0, world_size: int = 1, gather: Gather = alone) -> Checkpoint | None:
    """The newest whole checkpoint, every byte of it verified by the ranks together; the same one on all of them.

    It is the one that `latest` names or, where that is damaged, one before it, with a warning. Steps after `latest`
    were left behind by a run that was taken back; they count only where there is no `latest`.

    Returns None where the run has no checkpoint. Raises CheckpointError where none is whole, and FaultError where the
    storage does not let it be seen whether the next one is.
    """
    root = checkpoints_folder(run)
    names = together(lambda: _candidates(root), gather)[0]
    problems: list[str] = []
    for name in names:
        checkpoint, problem, fault = None, None, False
        try:
            checkpoint = _patiently(partial(_verified, root / name, rank, world_size))
        except (CheckpointError, OSError) as error:
            problem, fault = str(error), is_fault(error)
        answers = gather((problem, fault))
        if faults := [other for other, fault in answers if fault]:
            raise FaultError(
                f"{root / name} cannot be read ({faults[0]}), though it may be whole. Give the same command again; "
                "where this comes again, look at that storage, or move the folder away to go on from the one before."
            )
        found = [other for other, _ in answers if other is not None]
        if checkpoint is not None and not found:
            if problems and rank == 0:
                logger.warning("%s is the newest whole checkpoint", checkpoint.folder)
            return checkpoint
        problems += found[:1]
        if rank == 0:
            logger.warning("%s is passed over: %s", name, found[0])
    if problems:
        raise CheckpointError(
            f"{root} holds no whole checkpoint, of {len(names)} ({problems[0]}). Copy a whole one back, or start again "
            "in another --output."
        )
    return None


def _verified(folder: Path, rank: int = 0, world_size: int = 1) -> Checkpoint:
    checkpoint = Checkpoint.open(folder)
    checkpoint.verify(rank, world_size)
    return checkpoint


def _patiently(read: Callable[[], Checkpoint]) -> Checkpoint:
    """What is read, at the last attempt if need be. Raises what the last one does."""
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if not is_fault(error):
                raise
            logger.warning("%s; tried again in %g s", error, pause)
            time.sleep(pause)
    return read()


def checkpoint_at(run: str | Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of a step, or the newest whole one, verified. Raises CheckpointError where there is none."""
    if step is None:
        newest = newest_checkpoint(run)
        if newest is None:
            raise CheckpointError(f"{run} holds no checkpoint: give the --output folder of a training run.")
        return newest
    folder = checkpoints_folder(run) / step_name(step)
    if not folder.is_dir():
        kept = sorted(path.name for path in checkpoints_folder(run).glob("step-*"))
        raise CheckpointError(
            f"{folder} does not exist: the run keeps {', '.join(kept) or 'no checkpoint'}. Give another step."
        )
    return _verified(folder)


def _candidates(root: Path) -> list[str]:
    """Names of steps in the order to try them."""
    steps = sorted((path.name for path in root.glob("step-*")), reverse=True)
    pointer = root / LATEST
    named = pointer.read_bytes().decode(errors="replace").strip() if pointer.exists() else ""
    if re.fullmatch(r"step-\d{8,}", named):
        return [named, *(name for name in steps if name < named)]
    return steps
