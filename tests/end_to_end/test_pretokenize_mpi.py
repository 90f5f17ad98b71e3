"""Pre-tokenization by the ranks of a real mpirun: its bytes, its one report, and how a rank's failure ends all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from captioned_tars import contents, small_rqvae, write_tars

from megarq.inference.pretrained import save_rqvae
from tests.end_to_end.commands import MPIRUN, ON_CPU, ROOT, succeed

SHARDS, TORN = 5, 2


class Alone(NamedTuple):
    """What one process made of some image shards."""

    options: tuple[object, ...]
    """Of the command, but for --data and --output."""
    shards: Path
    codes: Path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    folder = tmp_path_factory.mktemp("mpi")
    write_tars(folder / "shards", [6] * SHARDS)
    save_rqvae(small_rqvae(0), folder / "rqvae")
    options = ("--rqvae", folder / "rqvae", "--batch-size", 4, "--draws", 2)
    succeed("tools/pretokenize.py", *options, "--data", folder / "shards", "--output", folder / "codes")
    return Alone(options, folder / "shards", folder / "codes")


def mpirun(*jobs: tuple[object, ...], ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """The command on so many ranks with these arguments, or several such jobs as one; it must end in time."""
    command: list[object] = [MPIRUN]
    for arguments in jobs:
        command += ["-n", ranks, sys.executable, "tools/pretokenize.py", *arguments, ":"]
    words, environment = list(map(str, command[:-1])), os.environ | ON_CPU
    return subprocess.run(words, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=120, check=False)


def test_two_ranks_make_the_bytes_of_one_process_and_report_once(alone: Alone, tmp_path: Path) -> None:
    output = tmp_path / "codes"
    done = mpirun((*alone.options, "--data", alone.shards, "--output", output), ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"samples in {SHARDS} shards in {output}") == 1 and done.stdout.count("perplexity") == 1
    assert contents(output) == contents(alone.codes)


def test_a_shard_that_is_no_tar_is_named_when_all_others_are_done(alone: Alone, tmp_path: Path) -> None:
    shards, output = shutil.copytree(alone.shards, tmp_path / "shards"), tmp_path / "codes"
    torn = shards / f"{TORN:05d}.tar"
    torn.write_bytes(b"no tar" * 1000)
    job = (*alone.options, "--data", shards, "--output", output)
    done = mpirun(job, ranks=2)
    assert done.returncode == 2, done.stderr
    assert f"1 of {SHARDS} image shards could not be read:\n    {torn}: " in done.stderr
    made = {f"{index:06d}.tar" for index in range(SHARDS) if index != TORN}
    assert {path.name for path in output.glob("*.tar")} == made and not (output / "manifest.json").exists()
    shutil.copy(alone.shards / torn.name, torn)
    succeed("tools/pretokenize.py", *job)
    assert contents(output) == contents(alone.codes)


def test_one_rank_that_fails_for_good_ends_the_others(alone: Alone, tmp_path: Path) -> None:
    """The folder was begun with two draws: rank 1 asks for three, while rank 0 would wait for it at the end."""
    output = shutil.copytree(alone.codes, tmp_path / "codes")
    job = (*alone.options, "--data", alone.shards, "--output", output)
    done = mpirun(job, (*job, "--draws", 3))
    assert done.returncode == 2, done.stderr
    assert f"error on rank 1: {output} was begun with draws=2, this command has draws=3" in done.stderr
    assert contents(output) == contents(alone.codes)
