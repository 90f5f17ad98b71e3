"""Saving a run's steps beside the training: every rank writes its own file, rank 0 then makes the step visible.

    step boundary   all ranks   wait for the save before; copy this rank's fragments to CPU memory
    in a thread     each rank   .step-00000120.tmp/rank-00003.safetensors, then rank-00003.json: name, size, sha256
                    rank 0      when all of these have come: metadata.json, rename to step-00000120, `latest`,
                                removal of old steps

Threads call no collectives: they meet in the file system. What failed on one rank is raised on all of them where they
meet next, in `save` or `finish`. A kill at any moment leaves the checkpoint before as it was.
"""

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any

from torch import Tensor

from megarq.checkpoint.format import METADATA, VERSION, Fragment, write_rank_file
from megarq.checkpoint.run_folder import LATEST, checkpoints_folder, step_name
from megarq.config.run import CheckpointConfig
from megarq.errors import CheckpointError, FaultError, MegarqError, is_fault
from megarq.files import write_atomically
from megarq.launch.gather import Gather
from megarq.parallel.together import gather_objects, together
from megarq.parallel.topology import Topology

_PATIENCE = 600.0
"""Seconds without a new byte of any rank after which rank 0 gives a save up."""
_PATIENCE_AFTER_ERROR = 10.0
"""The same where training has failed, perhaps by the death of a rank that is waited for."""
_SHARE = 0.75
"""Share of a host's available memory that copies may take."""

_CONTROL_GROUP, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

logger = logging.getLogger(__name__)


class _SilenceError(FaultError):
    """Ranks that should write do not."""


class CheckpointWriter:
    """Writes one checkpoint after the other. Every rank makes the same calls; as a context it ends with `finish`."""

    def __init__(
        self,
        run: str | Path,
        config: CheckpointConfig,
        topology: Topology,
        start_step: int,
        say: Callable[[str], object] = logger.info,
        published: Callable[[int, float], object] = lambda step, seconds: None,
        gather: Gather = gather_objects,
    ) -> None:
        """Prepare to save steps after `start_step`.

        Args:
            run: the run's folder.
            config: how many checkpoints are kept, and whether training goes on while one is written.
            topology: which rank this is, of how many.
            start_step: where this run started: later steps on disk are of a future that it discards.
            say: where rank 0 tells what was saved.
            published: called on rank 0, in a thread, with a step whose checkpoint can be seen, and the seconds it took.
            gather: an all-gather of a Python object over all ranks.
        """
        self._root = checkpoints_folder(run)
        self._config, self._rank, self._world_size = config, topology.rank, topology.world_size
        self._saved = start_step
        self._say, self._published, self._gather = say, published, gather
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: list[Future[None]] = []
        self._cancelled = Event()
        self._patience = _PATIENCE
        self._told = False

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
            else:
                self._patience = _PATIENCE_AFTER_ERROR
            for future in self._under_way:
                if failure := future.exception():
                    logger.warning("%s", failure)
        finally:
            self._thread.shutdown()

    def save(self, step: int, tensors: Mapping[str, tuple[Fragment, Tensor]], metadata: Mapping[str, Any]) -> None:
        """Save a step (collective), when the save before it is done.

        Args:
            step: optimiser steps done.
            tensors: this rank's fragments, keyed "<kind>/<name>"; they may change once this returns.
            metadata: what else a resumed run needs; the same on all ranks.

        Raises MegarqError on all ranks where one could not write this step or the one before.
        """
        self.finish()
        temporary = self._root / f".{step_name(step)}.tmp"
        needed = sum(tensor.nbytes for _, tensor in tensors.values())

        def prepare() -> tuple[str, int, int]:
            if self._rank == 0:
                self._clear()
                temporary.mkdir(parents=True)
            return socket.gethostname(), needed, available_memory()

        beside = self._has_room(together(prepare, self._gather))
        if beside:
            tensors = {key: (place, tensor.detach().to("cpu", copy=True)) for key, (place, tensor) in tensors.items()}
        self._cancelled.clear()
        self._under_way = [self._thread.submit(self._write, temporary, tensors)]
        if self._rank == 0:
            self._under_way.append(self._thread.submit(self._publish, step, temporary, metadata))
        if not beside:
            self.finish()

    def finish(self) -> None:
        """Wait until the save under way can be seen (collective). Raises MegarqError on all ranks where it failed."""
        if not self._under_way:
            return
        writing, *publishing = self._under_way
        self._under_way = []
        try:
            together(writing.result, self._gather)
            together(lambda: [future.result() for future in publishing], self._gather)
        except MegarqError:
            self._cancelled.set()
            for future in publishing:
                future.exception()
                self._clear()
            raise

    def _has_room(self, reports: list[tuple[str, int, int]]) -> bool:
        """Whether every host has room for its ranks' copies; a report is a host, the bytes to copy, and those free."""
        if not self._config.asynchronous:
            return False
        for host in {host for host, _, _ in reports}:
            needed = sum(report[1] for report in reports if report[0] == host)
            free = min(report[2] for report in reports if report[0] == host)
            if needed > _SHARE * free:
                if not self._told:
                    self._say(
                        f"checkpoints are written while training waits: copies for a thread need {needed / 2**30:.1f} "
                        f"GiB of memory on {host}, {free / 2**30:.1f} GiB are free"
                    )
                self._told = True
                return False
        return True

    def _write(self, temporary: Path, tensors: Mapping[str, tuple[Fragment, Tensor]]) -> None:
        """In the thread: this rank's file, then its entry, which says that the file is whole or why it is not."""
        entry = temporary / _entry_file(self._rank)
        try:
            write_atomically(entry, json.dumps(write_rank_file(temporary, self._rank, tensors)))
        except Exception as error:  # whatever it is, the other ranks must hear of it
            failure = self._failure(temporary, error)
            with suppress(OSError):
                write_atomically(entry, json.dumps({"failure": str(error), "fault": isinstance(failure, FaultError)}))
            raise failure from error

    def _publish(self, step: int, temporary: Path, metadata: Mapping[str, Any]) -> None:
        """In rank 0's thread: wait for all ranks' files, then give the folder its name."""
        start = time.monotonic()
        final = self._root / step_name(step)
        replaced = self._root / f".{final.name}.replaced"
        try:
            files = self._collect(temporary)
            for rank in range(self._world_size):
                (temporary / _entry_file(rank)).unlink()
            document = {"format": "megarq-checkpoint", "version": VERSION, "step": step, "files": files, **metadata}
            write_atomically(temporary / METADATA, json.dumps(document, indent=1))
            _sync_folder(temporary)
            if final.exists():
                final.rename(replaced)
            temporary.rename(final)
            _sync_folder(self._root)
            write_atomically(self._root / LATEST, f"{final.name}\n")
            shutil.rmtree(replaced, ignore_errors=True)
            self._prune(step)
        except Exception as error:  # as in _write
            raise self._failure(temporary, error) from error
        seconds = time.monotonic() - start
        self._say(f"step {step}: checkpoint saved, written in {seconds:.1f} s")
        self._published(step, seconds)

    def _collect(self, temporary: Path) -> list[dict[str, Any]]:
        """The entries of all ranks' files, in order of rank."""
        found: dict[int, dict[str, Any]] = {}
        progress, since, pause = -1, time.monotonic(), 0.01
        while True:
            for rank in set(range(self._world_size)) - found.keys():
                with suppress(FileNotFoundError):
                    found[rank] = json.loads((temporary / _entry_file(rank)).read_bytes())
                    if "failure" in found[rank]:
                        kind = FaultError if found[rank]["fault"] else MegarqError
                        raise kind(f"rank {rank}: {found[rank]['failure']}")
            if len(found) == self._world_size:
                return [found[rank] for rank in range(self._world_size)]
            written = sum(path.stat().st_size for path in temporary.glob("rank-*.safetensors"))
            if written > progress:
                progress, since = written, time.monotonic()
            if (seconds := time.monotonic() - since) > self._patience:
                missing = sorted(set(range(self._world_size)) - found.keys())
                raise _SilenceError(f"no rank wrote for {seconds:.0f} s; still missing: {missing}")
            if self._cancelled.wait(pause):
                raise MegarqError("another rank failed")
            pause = min(2 * pause, 1.0)

    def _failure(self, temporary: Path, error: Exception) -> MegarqError:
        """A fault of the storage, which a restart may find mended, or what a person must mend."""
        if isinstance(error, MegarqError | OSError) and is_fault(error):
            return FaultError(
                f"{temporary} could not be written ({error}); the checkpoint before it is whole. Give the same command "
                "again to go on from it, and look at that storage where this comes again."
            )
        return CheckpointError(
            f"{temporary} could not be written ({error}); the checkpoint before it is whole. Free disk space there and "
            "give the same command again to go on from it."
        )

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save under way has failed."""
        return any(future.done() and future.exception() is not None for future in self._under_way)

    def _prune(self, step: int) -> None:
        """Remove the oldest steps, and those that this run has passed without saving them: another run left them.

        Later steps, of a run that was taken back to an earlier one, stay until they are passed or written again.
        """
        steps = sorted(path for path in self._root.glob("step-*") if path.name <= step_name(step))
        passed = [path for path in steps if step_name(self._saved) < path.name < step_name(step)]
        kept = [path for path in steps if path not in passed]
        for folder in passed + (kept[: -self._config.keep] if self._config.keep else []):
            try:
                shutil.rmtree(folder)
            except OSError as error:
                logger.warning("%s could not be removed: %s", folder, error)
        self._saved = step

    def _clear(self) -> None:
        """Remove what unfinished saves left behind."""
        for folder in self._root.glob(".step-*"):
            shutil.rmtree(folder, ignore_errors=True)


def available_memory() -> int:
    """Bytes that this host could give without swapping, within the job's control group; none where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    for folder, limit, used in _control_groups(_OWN_GROUPS, _CONTROL_GROUP):
        with suppress(OSError, ValueError):  # no such file, or "max": no limit
            free = min(free, int((folder / limit).read_text()) - int((folder / used).read_text()))
    return max(0, free)


def _control_groups(own: Path, root: Path) -> Iterator[tuple[Path, str, str]]:
    """The control groups that this process is in, innermost first, with the files of their limit and use of memory."""
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":  # version 2
                base, files = root, ("memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                base, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            else:
                continue
            folder = base / path.lstrip("/")
            for above in (folder, *folder.parents):
                yield above, *files
                if above == base:
                    break


def _entry_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
