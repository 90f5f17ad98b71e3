"""Picture sets drawn by SLURM: tasks on two nodes draw the bits that one process draws."""

from pathlib import Path

from captioned_tars import contents
from tiny_drawing import COUNT, TARS, drawing_command

from tests.end_to_end.commands import succeed
from tests.slurm.conftest import Slurm


def test_srun_tasks_draw_the_same_bits(slurm: Slurm, tmp_path: Path) -> None:
    command = drawing_command(tmp_path)
    succeed(*command, "--output", tmp_path / "alone")
    printed = slurm.srun(
        "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "python", *command, "--output", tmp_path / "set"
    )
    assert f"{COUNT} pictures in {TARS} tars, complete" in printed
    assert contents(tmp_path / "set") == contents(tmp_path / "alone")
