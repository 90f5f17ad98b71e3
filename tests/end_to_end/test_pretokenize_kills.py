"""Pre-tokenization killed at random moments, then run again: not a byte differs from an undisturbed run's."""

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
from tests.end_to_end.commands import ON_CPU, ROOT, succeed

SHARDS, SAMPLES = 16, 24
MPIRUN = Path(sys.executable).with_name("mpirun")


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
    options = ("--rqvae", folder / "rqvae", "--data", folder / "shards", "--draws", 2, "--batch-size", 4)
    succeed("tools/pretokenize.py", *options, "--output", folder / "codes")
    times = [path.stat().st_mtime for path in (folder / "codes").iterdir()]
    return Undisturbed(folder, options, max(times) - min(times), contents(folder / "codes"))


def start(undisturbed: Undisturbed, output: Path, ranks: int) -> subprocess.Popen[bytes]:
    """The command on so many ranks; what they print goes into a file beside the output."""
    command = [MPIRUN, "-n", ranks, sys.executable, "tools/pretokenize.py", *undisturbed.options, "--output", output]
    environment = {**os.environ, **ON_CPU}
    with (output.parent / "log").open("wb") as log:
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def killed(undisturbed: Undisturbed, output: Path, ranks: int, moment: float) -> int:
    """Kill all ranks `moment` seconds after their first shard began.

    Returns the shards that were done, or one more than there are where the run had ended.
    """
    job = start(undisturbed, output, ranks)
    deadline = time.monotonic() + 120
    while not list(output.glob(".*.tar.tmp")) and job.poll() is None:
        assert time.monotonic() < deadline, (output.parent / "log").read_text()
        time.sleep(0.002)
    time.sleep(moment)
    done = len(list(output.glob("*.tar")))
    for process in processes_of(output):
        os.kill(process, signal.SIGKILL)
    job.wait()
    return SHARDS + 1 if (output / "manifest.json").exists() else done


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
    output = tmp_path / "codes"
    for ranks, moment in zip((4, 2, 1), moments(undisturbed, 3, ranks=3), strict=True):
        assert killed(undisturbed, output, ranks, moment / 5) <= SHARDS, "the run had ended before the kill"
    succeed("tools/pretokenize.py", *undisturbed.options, "--output", output)
    assert contents(output) == undisturbed.codes


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_of_twenty_kills_leaves_no_trace(undisturbed: Undisturbed, tmp_path: Path, ranks: int) -> None:
    done = []
    for number, moment in enumerate(moments(undisturbed, 20, ranks)):
        output = tmp_path / f"codes{number}"
        done.append(killed(undisturbed, output, ranks, moment))
        assert start(undisturbed, output, ranks).wait(120) == 0, (tmp_path / "log").read_text()
        assert contents(output) == undisturbed.codes, f"killed after {moment} s"
    assert sum(shards <= SHARDS for shards in done) >= 10, f"most runs had ended before the kill: {done}"
    assert len(set(done)) > 3, f"the kills were not spread over the run: {done} shards done of {SHARDS}"
