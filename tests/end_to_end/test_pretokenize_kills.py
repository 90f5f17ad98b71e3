"""Pre-tokenization killed at random moments, then run again: not a byte differs from an undisturbed run's."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from captioned_tars import contents, small_rqvae, write_tars

from megarq.inference.pretrained import save_rqvae
from tests.end_to_end.commands import MPIRUN, ON_CPU, ROOT, succeed

SHARDS, SAMPLES = 16, 16


class Undisturbed(NamedTuple):
    folder: Path
    options: tuple[object, ...]
    """Of the command, but for --output."""
    seconds: float
    """That one rank takes from its first shard to the end."""
    codes: dict[str, bytes]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("kills")
    write_tars(folder / "shards", [SAMPLES] * SHARDS)
    save_rqvae(small_rqvae(0), folder / "rqvae")
    options = ("--rqvae", folder / "rqvae", "--data", folder / "shards", "--draws", 8, "--batch-size", 1)
    succeed("tools/pretokenize.py", *options, "--output", folder / "codes")
    times = [path.stat().st_mtime for path in (folder / "codes").iterdir()]
    return Undisturbed(folder, options, max(times) - min(times), contents(folder / "codes"))


class Killed(NamedTuple):
    """How far a run was when it was killed."""

    done: int
    """Shards that were whole, of this run and those before it."""
    torn: int
    """Shards that it was making."""
    ended: bool
    """Whether the folder was complete, so that the kill came too late."""


def start(undisturbed: Undisturbed, output: Path, ranks: int, *options: object) -> subprocess.Popen[bytes]:
    """The command on so many ranks; what they print goes into a file beside the output."""
    command = [MPIRUN, "-n", ranks, sys.executable, "tools/pretokenize.py", *undisturbed.options, *options]
    environment = {**os.environ, **ON_CPU}
    with (output.parent / "log").open("wb") as log:
        return subprocess.Popen(
            [*map(str, command), "--output", str(output)],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def killed(
    undisturbed: Undisturbed, output: Path, ranks: int, moment: float, more: int = 0, workers: int = 0
) -> Killed:
    """Kill all ranks `moment` seconds after they were first at work on a shard with so many more done."""
    left, before = half_made(output), count_done(output)
    job = start(undisturbed, output, ranks, "--workers", workers)
    deadline = time.monotonic() + 120
    while job.poll() is None and (half_made(output) <= left or count_done(output) < before + more):
        assert time.monotonic() < deadline, (output.parent / "log").read_text()
        time.sleep(0.002)
    time.sleep(moment)
    for process in processes_of(output):
        os.kill(process, signal.SIGKILL)
    job.wait()
    return Killed(count_done(output), len(half_made(output) - left), (output / "manifest.json").exists())


def count_done(output: Path) -> int:
    """Shards that have their name."""
    return len(list(output.glob("*.tar")))


def half_made(output: Path) -> set[tuple[str, int]]:
    """Temporaries of shards, each with when it was written last: a run writes over those of one that was killed."""
    found = set()
    for path in output.glob(".*.tar.tmp"):
        with contextlib.suppress(FileNotFoundError):  # it has its final name meanwhile
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def processes_of(output: Path) -> list[int]:
    """Everything that has this folder on its command line; mpirun gives its ranks process groups of their own."""
    wanted = os.fsencode(output)
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue  # it has ended meanwhile
    return found


def moments(undisturbed: Undisturbed, count: int, ranks: int) -> list[float]:
    """Random moments, one in each of `count` equal parts of the run."""
    source = random.Random(ranks)
    return [undisturbed.seconds * (part + source.random()) / count for part in range(count)]


def test_three_kills_leave_no_trace(undisturbed: Undisturbed, tmp_path: Path) -> None:
    output, source = tmp_path / "codes", random.Random(0)
    kills = [
        killed(undisturbed, output, ranks, source.random() * undisturbed.seconds / SHARDS, more, workers)
        for ranks, more, workers in ((4, 0, 0), (2, 2, 0), (1, 2, 1))
    ]
    assert not any(kill.ended for kill in kills), f"a run had ended before its kill: {kills}"
    assert any(0 < kill.done < SHARDS and kill.torn for kill in kills), f"no kill in the middle: {kills}"
    assert start(undisturbed, output, 2).wait(120) == 0, (tmp_path / "log").read_text()
    assert contents(output) == undisturbed.codes


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_of_twenty_kills_leaves_no_trace(undisturbed: Undisturbed, tmp_path: Path, ranks: int) -> None:
    kills = []
    for number, moment in enumerate(moments(undisturbed, 20, ranks)):
        output = tmp_path / f"codes{number}"
        kills.append(killed(undisturbed, output, ranks, moment))
        assert start(undisturbed, output, ranks).wait(120) == 0, (tmp_path / "log").read_text()
        assert contents(output) == undisturbed.codes, f"killed after {moment} s"
    assert sum(not kill.ended for kill in kills) >= 10, f"most runs had ended before the kill: {kills}"
    assert len({kill.done for kill in kills}) > 3, f"the kills were not spread over the run: {kills}"
