"""The checkpoints of a run: publishing one, finding the newest, keeping only so many."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megarq.checkpoint.format import METADATA, VERSION, Checkpoint, Fragment, write_rank_file
from megarq.errors import CheckpointError
from megarq.files import write_atomically
from megarq.parallel.together import Gather, gather_objects, together

LATEST = "latest"


def checkpoints_folder(run: str | Path) -> Path:
    """RUN/checkpoints."""
    return Path(run) / "checkpoints"


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def latest_checkpoint(run: str | Path) -> Checkpoint | None:
    """The checkpoint that `latest` names; None where the run has none. Raises CheckpointError where it is damaged."""
    pointer = checkpoints_folder(run) / LATEST
    if not pointer.exists():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    if not name.startswith("step-") or "/" in name:
        raise CheckpointError(f"{pointer} says {name!r}: expected a name such as {step_name(120)}.")
    return Checkpoint.open(pointer.parent / name)


def checkpoint_at(run: str | Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of a step, or the newest. Raises CheckpointError where there is none."""
    if step is not None:
        folder = checkpoints_folder(run) / step_name(step)
        if not folder.is_dir():
            kept = sorted(path.name for path in checkpoints_folder(run).glob("step-*"))
            raise CheckpointError(
                f"{folder} does not exist: the run keeps {', '.join(kept) or 'no checkpoint'}. Give another step."
            )
        return Checkpoint.open(folder)
    newest = latest_checkpoint(run)
    if newest is None:
        raise CheckpointError(f"{run} holds no checkpoint: give the --output folder of a training run.")
    return newest


def publish_checkpoint(
    run: str | Path,
    step: int,
    tensors: Mapping[str, tuple[Fragment, Tensor]],
    metadata: Mapping[str, Any],
    keep: int,
    rank: int,
    gather: Gather = gather_objects,
) -> None:
    """Save a step, collectively: all ranks write their files under a temporary name, rank 0 then gives it its name.

    Args:
        run: the run's folder.
        step: optimiser steps done.
        tensors: this rank's fragments, keyed "<kind>/<name>".
        metadata: what else a resumed run needs; the same on all ranks.
        keep: newest checkpoints left on disk; 0 keeps all.
        rank: this rank; 0 publishes.
        gather: an all-gather of a Python object over all ranks.

    Raises on all ranks where one cannot write: OSError there, MegarqError elsewhere. `latest` then names what it did.
    """
    root = checkpoints_folder(run)
    temporary, final = root / f".{step_name(step)}.tmp", root / step_name(step)

    def prepare() -> None:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def publish() -> None:
        if rank > 0:
            return
        document = {"format": "megarq-checkpoint", "version": VERSION, "step": step, "files": files, **metadata}
        write_atomically(temporary / METADATA, json.dumps(document, indent=1))
        replaced = root / f".{final.name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        _sync_folder(root)
        write_atomically(root / LATEST, f"{final.name}\n")
        shutil.rmtree(replaced, ignore_errors=True)
        _prune(root, final.name, keep)

    together(prepare, gather)
    files = together(lambda: write_rank_file(temporary, rank, tensors), gather)
    together(publish, gather)


def _prune(root: Path, newest: str, keep: int) -> None:
    """Later steps, of a run that was taken back to an earlier one, stay until they are written again."""
    steps = sorted(path for path in root.glob("step-*") if path.name <= newest)
    for folder in steps[:-keep] if keep else []:
        shutil.rmtree(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
