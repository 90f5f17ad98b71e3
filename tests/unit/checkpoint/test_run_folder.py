"""Finding a run's newest whole checkpoint, alone and on many ranks."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from made_up_checkpoints import Ranks, cut, save_together

from megarq.checkpoint import run_folder
from megarq.checkpoint.format import Checkpoint
from megarq.checkpoint.run_folder import checkpoint_at, newest_checkpoint
from megarq.errors import CheckpointError, FaultError
from megarq.files import file_sha256


def step_of(checkpoint: Checkpoint | None) -> int | None:
    return checkpoint.metadata["step"] if checkpoint else None


def remove_metadata(step: Path) -> None:
    (step / "metadata.json").unlink()


def cut_short(step: Path) -> None:
    path = step / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def change_a_byte(step: Path, rank: int = 0) -> None:
    path = step / f"rank-{rank:05d}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    shutil.rmtree: "has no metadata.json",
    remove_metadata: "has no metadata.json",
    cut_short: "were written",
    change_a_byte: "has the sha256",
}


def test_a_run_that_is_not_there_has_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path / "nothing") is None


@pytest.fixture
def failing(monkeypatch):
    """failing(number, times): the first so many files that are opened for their digests meet this error."""
    monkeypatch.setattr(run_folder, "PAUSES", (0.01, 0.01))

    def fail(number: int, times: int) -> None:
        left = [number] * times

        def digest(path: Path) -> str:
            if left:
                raise OSError(left.pop(), "made up", str(path))
            return file_sha256(path)

        monkeypatch.setattr("megarq.checkpoint.format.file_sha256", digest)

    return fail


@pytest.mark.parametrize("number", [errno.EIO, errno.ESHUTDOWN])
def test_a_storage_that_fails_for_a_moment_is_asked_again(run, publish, failing, number):
    publish(run, 6)
    failing(number, 2)
    assert step_of(newest_checkpoint(run)) == 6


def test_a_storage_that_goes_on_failing_hides_no_checkpoint(run, publish, failing):
    publish(run, 6)
    failing(errno.EIO, 100)
    with pytest.raises(FaultError, match="step-00000006 cannot be read .*made up.* though it may be whole"):
        newest_checkpoint(run)


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


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_used_with_a_warning(run, publish, caplog, damage):
    damage(publish(run, 6))
    assert step_of(newest_checkpoint(run)) == 3
    assert "step-00000006 is passed over" in caplog.text and DAMAGES[damage] in caplog.text
    assert "step-00000003 is the newest whole checkpoint" in caplog.text


def test_several_damaged_ones_are_passed_over(run, publish):
    for step in (6, 9, 12):
        change_a_byte(publish(run, step))
    assert step_of(newest_checkpoint(run)) == 3


def test_a_whole_newest_one_needs_no_warning(run, publish, caplog):
    change_a_byte(run / "checkpoints" / "step-00000003")
    publish(run, 6)
    assert step_of(newest_checkpoint(run)) == 6
    assert not caplog.text


def test_a_run_without_a_whole_checkpoint_is_refused_rather_than_started_anew(run, publish):
    change_a_byte(publish(run, 6))
    cut_short(run / "checkpoints" / "step-00000003")
    with pytest.raises(CheckpointError, match=r"holds no whole checkpoint, of 2 \(.*sha256.*start again in another"):
        newest_checkpoint(run)


def test_a_damaged_step_that_was_asked_for_is_refused(run, publish):
    change_a_byte(publish(run, 6))
    with pytest.raises(CheckpointError, match="has the sha256"):
        checkpoint_at(run, 6)


def test_steps_after_the_latest_are_of_a_discarded_future(run, publish):
    publish(run, 6)
    change_a_byte(run / "checkpoints" / "step-00000003")
    (run / "checkpoints" / "latest").write_text("step-00000003\n")
    with pytest.raises(CheckpointError, match="holds no whole checkpoint, of 1"):
        newest_checkpoint(run)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"../../elsewhere", b"step-1/../x"])
def test_without_a_pointer_the_newest_whole_one_is_used(run, publish, content):
    publish(run, 6)
    change_a_byte(publish(run, 9))
    pointer = run / "checkpoints" / "latest"
    pointer.unlink() if content is None else pointer.write_bytes(content)
    assert step_of(newest_checkpoint(run)) == 6


def test_ranks_that_share_the_verification_agree(tmp_path, caplog):
    """Only the rank that reads the third file sees that it is damaged."""
    held = cut("param/w", torch.ones(8), 0, 2, 2)
    save_together(tmp_path, 1, held, {})
    change_a_byte(save_together(tmp_path, 2, held, {}), rank=2)
    found = Ranks(4).run(lambda rank, gather: newest_checkpoint(tmp_path, rank, 4, gather))
    assert [step_of(checkpoint) for checkpoint in found] == [1, 1, 1, 1]
    assert caplog.text.count("step-00000002 is passed over") == 1
