"""Running MegaRQ's command lines: as a user types them, or in forked processes, which saves seconds of imports.

    typed("tools/make_shards.py", "--images", folder)          a process of its own; what it printed
    call("tools/make_shards.py", "--images", folder)           Outcome(status, printed, errors), from a fork

Both run on the CPU, whatever the machine has. A fork runs the script's file as `python FILE` does, but finds torch and
DeepSpeed imported already; each has its own, since DeepSpeed keeps process groups for the life of a process.
"""

import functools
import logging
import multiprocessing
import multiprocessing.process
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gloo_ranks import preload

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = Path(sys.executable).with_name("mpirun")
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SECONDS_FOR_A_COMMAND = 300


class Outcome(NamedTuple):
    """How a command ended."""

    status: int | None
    """Exit status: 0, 2 after an error, None where it did not end in time."""
    printed: str
    """What stands on stdout."""
    errors: str
    """What stands on stderr."""


def typed(script: str, *arguments: object, ranks: int | None = None) -> str:
    """Run a script from the repository's root, with `ranks` under DeepSpeed's launcher; returns stdout and stderr."""
    start = [sys.executable]
    if ranks is not None:
        launcher = Path(sys.executable).with_name("deepspeed")
        start = [str(launcher), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    command = [*start, script, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=_environment(), text=True, capture_output=True, timeout=SECONDS_FOR_A_COMMAND
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def call(script: str, *arguments: object) -> Outcome:
    """Run a script in a fork of this process, as one rank alone."""
    return _forks(script, arguments, [{}])[0]


def call_ranks(script: str, *arguments: object, ranks: int) -> list[Outcome]:
    """Run a script in one fork for each rank of a job, as torchrun starts them."""
    return _forks(script, arguments, _places(ranks))


def start_ranks(script: str, *arguments: object, ranks: int, log: Path) -> list[multiprocessing.process.BaseProcess]:
    """The forks of a job, running, each in a process group of its own; all that they print goes into one file."""
    _preload_once()
    start = multiprocessing.get_context("fork").Process
    forks = [start(target=_run_apart, args=(script, arguments, (log, log), place)) for place in _places(ranks)]
    for fork in forks:
        fork.start()
    return forks


def _places(ranks: int) -> list[dict[str, str]]:
    """The environment of each rank, as torchrun sets it."""
    job = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _forks(script: str, arguments: tuple[object, ...], places: list[dict[str, str]]) -> list[Outcome]:
    _preload_once()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        streams = [(Path(folder, f"stdout{rank}"), Path(folder, f"stderr{rank}")) for rank in range(len(places))]
        start = multiprocessing.get_context("fork").Process
        forks = [start(target=_run, args=(script, arguments, *rank)) for rank in zip(streams, places, strict=True)]
        for fork in forks:
            fork.start()
        for fork, written in zip(forks, streams, strict=True):
            fork.join(SECONDS_FOR_A_COMMAND)
            status = fork.exitcode
            fork.kill()
            outcomes.append(Outcome(status, *(path.read_text() for path in written)))
    return outcomes


def succeed(script: str, *arguments: object) -> Outcome:
    """`call` of what should work."""
    outcome = call(script, *arguments)
    assert outcome.status == 0, f"{script} ended with {outcome.status}:\n{outcome.printed}\n{outcome.errors}"
    return outcome


def error_of(outcome: Outcome) -> str:
    """The one message of a command that was refused."""
    assert outcome.status == 2, f"ended with {outcome.status}:\n{outcome.printed}\n{outcome.errors}"
    assert "Traceback" not in outcome.printed + outcome.errors
    before, label, message = outcome.errors.rpartition("error: ")
    assert label and "error: " not in before, outcome.errors
    return message


def refusal(script: str, *arguments: object) -> str:
    """The message of a command that is refused."""
    return error_of(call(script, *arguments))


@functools.cache
def _preload_once() -> None:
    preload()


def _run_apart(*given: Any) -> None:
    os.setpgrp()
    _run(*given)


def _run(script: str, arguments: tuple[object, ...], streams: tuple[Path, Path], place: dict[str, str]) -> None:
    """The fork: fresh streams, environment and log handlers, then the script's file."""
    for descriptor, (name, path) in enumerate(zip(("stdout", "stderr"), streams, strict=True), start=1):
        with path.open("ab") as file:
            os.dup2(file.fileno(), descriptor)
        setattr(sys, name, open(descriptor, "w", buffering=1, encoding="utf-8", closefd=False))  # noqa: SIM115
    environment = _environment() | place
    os.environ.clear()
    os.environ.update(environment)
    torch.cuda.is_available = lambda: False
    logging.getLogger().handlers.clear()
    os.chdir(ROOT)
    sys.path[0] = str((ROOT / script).parent)
    sys.argv = [script, *map(str, arguments)]
    runpy.run_path(script, run_name="__main__")


def _environment() -> dict[str, str]:
    """The environment of a user without launcher, and without GPUs."""
    launched = {name for name in os.environ if name in LAUNCHED or name.startswith("SLURM_")}
    return {name: value for name, value in os.environ.items() if name not in launched} | ON_CPU


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
