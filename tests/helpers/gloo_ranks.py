"""Forked gloo groups: ranks that live as long as a test module and run the functions they are sent.

    group = RankGroup(2, folder)
    group.run(work, 3)        -> [work(3) on rank 0, work(3) on rank 1]

Workers are forked from the test process after `preload` has imported everything, so that a group costs two seconds and
not ten. They must therefore be forked before this process starts threads: on a machine with GPUs no test of a module
that forks groups may call `backward` itself; a group of one rank does it.
A function travels by its name, so it must stand at the top of its module. Where a rank raises, dies or does not answer,
`run` raises RankError with its traceback, ends the group, and the next `run` forks a new one.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

_IMPORTED_BY_RANKS = (
    "torch._dynamo",
    "torch.utils.tensorboard",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # every engine imports it, and it takes seconds
    "megarq.engine.transformer_run",
)
SECONDS_FOR_A_CASE = 120
SECONDS_BETWEEN_LOOKS = 5
CASES_OF_A_LIFE = 20
"""After so many cases ranks are forked anew: each engine leaves process groups behind, whose threads never sleep."""


class RankError(AssertionError):
    """What went wrong on a rank."""


def preload() -> None:
    """Import what ranks need, once, in the process that they are forked from; DeepSpeed for the CPU."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chosen = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import_module("deepspeed").get_accelerator()
    finally:
        os.environ.pop("DS_ACCELERATOR")
        if chosen is not None:
            os.environ["DS_ACCELERATOR"] = chosen
    for module in _IMPORTED_BY_RANKS:
        import_module(module)


class RankGroup:
    """`size` processes joined in gloo's default group."""

    def __init__(self, size: int, folder: Path) -> None:
        """`folder` is empty and takes the files through which the ranks meet."""
        self.size = size
        self._folder = folder
        self._started = 0
        self._cases = 0
        self._ranks: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """The answers of `work(*args)` from all ranks, in their order. Raises RankError."""
        if self._cases == CASES_OF_A_LIFE:
            self.close()
        if not self._ranks:
            self._start()
        self._cases += 1
        message = pickle.dumps((work, args))
        for _, pipe in self._ranks:
            pipe.send_bytes(message)
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + SECONDS_FOR_A_CASE
        while len(answers) < self.size:
            waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks) if rank not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                self._print_stacks()
                self._fail(f"no answer from ranks {sorted(waiting.values())} in {SECONDS_FOR_A_CASE} s")
            for pipe in ready:
                answers[waiting[pipe]] = self._receive(waiting[pipe])
        return [answers[rank] for rank in range(self.size)]

    def close(self) -> None:
        """End the ranks."""
        for process, pipe in self._ranks:
            if process.is_alive():
                pipe.send_bytes(pickle.dumps(None))
        for process, pipe in self._ranks:
            pipe.close()
            process.join(SECONDS_BETWEEN_LOOKS)
            if process.is_alive():
                process.kill()
                process.join()
        self._ranks = []

    def _start(self) -> None:
        preload()
        self._started += 1
        self._cases = 0
        rendezvous = self._folder / f"rendezvous{self._started}"
        fork = multiprocessing.get_context("fork")
        for rank in range(self.size):
            ours, theirs = fork.Pipe()
            process = fork.Process(
                target=_serve, args=(theirs, rank, self.size, rendezvous, os.getpid(), ours), daemon=True
            )
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def _receive(self, rank: int) -> Any:
        process, pipe = self._ranks[rank]
        try:
            failure, answer = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            process.join()
            self._fail(f"rank {rank} died with exit code {process.exitcode}")
        if failure:
            self._fail(f"rank {rank} of {self.size} raised\n{failure}")
        return answer

    def _fail(self, reason: str) -> NoReturn:
        for process, _ in self._ranks:
            process.kill()
            process.join()
        self.close()
        raise RankError(reason)

    def _print_stacks(self) -> None:
        for process, _ in self._ranks:
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGUSR1)
                process.join(0.2)


def _serve(pipe: Connection, rank: int, size: int, rendezvous: Path, parent: int, parents_end: Connection) -> None:
    parents_end.close()
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=SECONDS_FOR_A_CASE),
    )
    try:
        while _has_message(pipe, parent) and (message := pickle.loads(pipe.recv_bytes())):
            work, args = message
            try:
                reply = None, work(*args)
            except Exception:
                reply = traceback.format_exc(), None
            pipe.send_bytes(pickle.dumps(reply))
    finally:
        dist.destroy_process_group()


def _has_message(pipe: Connection, parent: int) -> bool:
    """Wait for a message; False where the test process is gone."""
    while not pipe.poll(SECONDS_BETWEEN_LOOKS):
        if os.getppid() != parent:
            return False
    return True
