"""Publishing, finding and keeping checkpoints; what a kill at any moment leaves behind."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from megarq.checkpoint import run_folder
from megarq.checkpoint.format import Checkpoint
from megarq.checkpoint.run_folder import checkpoint_at, latest_checkpoint, publish_checkpoint
from megarq.errors import CheckpointError


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*") if path.is_dir())


def step_of(checkpoint: Checkpoint | None) -> int | None:
    return checkpoint.metadata["step"] if checkpoint else None


def test_a_run_that_is_not_there_has_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_a_published_checkpoint_is_the_latest(run, publish):
    publish(run, 6)
    assert step_of(latest_checkpoint(run)) == 6
    assert (run / "checkpoints" / "latest").read_text() == "step-00000006\n"


def test_nothing_temporary_is_left(run, publish):
    publish(run, 6)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "latest",
        "step-00000003",
        "step-00000006",
    ]


def test_a_step_is_found_by_its_number(run, publish):
    publish(run, 6)
    assert step_of(checkpoint_at(run, 3)) == 3
    assert step_of(checkpoint_at(run)) == 6


def test_a_step_that_was_not_kept_is_refused_naming_those_that_were(run):
    with pytest.raises(CheckpointError, match="step-00000005 does not exist: the run keeps step-00000003"):
        checkpoint_at(run, 5)


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint: give the --output folder of a training run"):
        checkpoint_at(tmp_path)


@pytest.mark.parametrize(("keep", "kept"), [(1, [9]), (2, [6, 9]), (5, [1, 3, 6, 9]), (0, [1, 3, 6, 9])])
def test_the_newest_are_kept(tmp_path, publish, keep, kept):
    for step in (1, 3, 6, 9):
        publish(tmp_path, step, keep=keep)
    assert steps(tmp_path) == [f"step-{step:08d}" for step in kept]


def test_a_step_saved_again_replaces_the_first(run, publish):
    publish(run, 3, architecture="again")
    assert checkpoint_at(run, 3).metadata["architecture"] == "again"
    assert steps(run) == ["step-00000003"]


def test_retention_never_removes_what_latest_names(tmp_path, publish):
    """A run that was taken back to an earlier step writes steps below those that lie about from before."""
    for step in (3, 6, 9):
        publish(tmp_path, step, keep=2)
    publish(tmp_path, 4, keep=2)
    assert step_of(latest_checkpoint(tmp_path)) == 4


@pytest.mark.parametrize("name", ["../../elsewhere", "", "latest", "step-1/../x"])
def test_a_pointer_that_names_no_step_is_refused(run, name):
    (run / "checkpoints" / "latest").write_text(name)
    with pytest.raises(CheckpointError, match="expected a name such as step-00000120"):
        latest_checkpoint(run)


def test_a_pointer_to_a_removed_step_is_refused(run):
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    with pytest.raises(CheckpointError, match=r"step-00000003 has no metadata.json"):
        latest_checkpoint(run)


def raising(*_: object, **__: object) -> None:
    raise OSError("no space left on device")


@pytest.mark.parametrize("moment", ["write_rank_file", "write_atomically", "_sync_folder"])
def test_a_save_that_fails_leaves_the_checkpoint_before_valid(run, publish, monkeypatch, moment):
    monkeypatch.setattr(run_folder, moment, raising)
    with pytest.raises(OSError, match="no space"):
        publish(run, 6)
    monkeypatch.undo()
    assert step_of(latest_checkpoint(run)) == 3
    assert latest_checkpoint(run).tensor("bias").tolist() == [0, 1, 2, 3, 4]
    publish(run, 6)
    assert step_of(latest_checkpoint(run)) == 6


def test_a_half_written_rank_file_leaves_the_checkpoint_before_valid(run, publish, monkeypatch):
    def half(folder: Path, rank: int, tensors: object) -> None:
        (folder / "rank-00000.safetensors").write_bytes(b"half")
        raise SafetensorError("killed")

    monkeypatch.setattr(run_folder, "write_rank_file", half)
    with pytest.raises(SafetensorError):
        publish(run, 6)
    monkeypatch.undo()
    assert step_of(latest_checkpoint(run)) == 3


def test_every_rank_writes_its_file_and_rank_0_publishes(tmp_path):
    """Two ranks in turn, the collective played by hand: rank 1 writes while rank 0 gathers."""
    from megarq.checkpoint.format import Fragment, write_rank_file

    whole = torch.arange(8.0).reshape(2, 4)
    pieces = [{"param/w": (Fragment((2, 4), start=4 * rank), whole[rank])} for rank in range(2)]

    def gather(outcome: tuple[object, None]) -> list:
        if outcome == (None, None):
            return [outcome, outcome]
        temporary = tmp_path / "checkpoints" / ".step-00000001.tmp"
        return [outcome, (write_rank_file(temporary, 1, pieces[1]), None)]

    publish_checkpoint(tmp_path, 1, pieces[0], {}, 0, 0, gather)
    checkpoint = checkpoint_at(tmp_path)
    assert torch.equal(checkpoint.tensor("w"), whole)
    metadata = json.loads((checkpoint.folder / "metadata.json").read_text())
    assert [entry["name"] for entry in metadata["files"]] == ["rank-00000.safetensors", "rank-00001.safetensors"]
