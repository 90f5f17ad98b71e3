"""Pre-tokenization by SLURM: tasks of one job and tasks of an array write the bytes that one process writes."""

import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from captioned_tars import contents, small_rqvae, write_tars

from megarq.inference.pretrained import save_rqvae
from tests.end_to_end.commands import succeed
from tests.slurm.conftest import Slurm


class Alone(NamedTuple):
    command: tuple[str, ...]
    """What is typed, but for --output."""
    codes: dict[str, bytes]
    """What one process makes of it."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    folder = tmp_path_factory.mktemp("alone")
    write_tars(folder / "shards", [12] * 6)
    save_rqvae(small_rqvae(0), folder / "rqvae")
    options = ("--rqvae", str(folder / "rqvae"), "--data", str(folder / "shards"), "--draws", "1")
    succeed("tools/pretokenize.py", *options, "--output", folder / "codes")
    return Alone(("python", "tools/pretokenize.py", *options), contents(folder / "codes"))


def test_srun_tasks_write_the_same_bytes(slurm: Slurm, alone: Alone, tmp_path: Path) -> None:
    printed = slurm.srun("--nodes=2", "--ntasks=2", *alone.command, "--output", tmp_path / "codes")
    assert contents(tmp_path / "codes") == alone.codes
    assert "72 samples in 6 shards" in printed


def test_array_tasks_write_the_same_bytes(slurm: Slurm, alone: Alone, tmp_path: Path) -> None:
    command = shlex.join([*alone.command, "--output", str(tmp_path / "codes")])
    printed = slurm.sbatch(command, "--array=0-1")
    assert contents(tmp_path / "codes") == alone.codes
    assert "72 samples in 6 shards" in "".join(printed.values()) and set(printed) == {"0", "1"}
