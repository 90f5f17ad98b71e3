"""Saving steps: what is visible when, what a failure on any rank leaves behind, and that training goes on meanwhile."""

import errno
import json
import os
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from made_up_checkpoints import Ranks, cut, save_together
from safetensors import SafetensorError

from megarq.checkpoint import writer as writer_module
from megarq.checkpoint.format import Checkpoint, Fragment, write_rank_file
from megarq.checkpoint.run_folder import alone, checkpoint_at, newest_checkpoint
from megarq.checkpoint.writer import CheckpointWriter, available_memory
from megarq.config.run import CheckpointConfig
from megarq.errors import CheckpointError, FaultError, MegarqError
from megarq.launch.gather import Gather
from megarq.parallel.topology import Topology

SECONDS = 30
ONE = {"param/w": (Fragment((4,)), torch.arange(4.0))}


def step_of(checkpoint: Checkpoint | None) -> int | None:
    return checkpoint.metadata["step"] if checkpoint else None


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*") if path.is_dir())


def writer_of(run: Path, start_step: int = 0, keep: int = 0, **options: Any) -> CheckpointWriter:
    """A writer of a run of one rank."""
    return CheckpointWriter(run, CheckpointConfig(keep=keep), Topology(), start_step, **{"gather": alone} | options)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Event:
    """Rank files are written only once this event is set."""
    released = Event()

    def write(folder: Path, rank: int, tensors: Any) -> dict[str, Any]:
        assert released.wait(SECONDS)
        return write_rank_file(folder, rank, tensors)

    monkeypatch.setattr(writer_module, "write_rank_file", write)
    return released


def raising(*_: object, **__: object) -> None:
    raise OSError("no space left on device")


def test_a_published_checkpoint_is_the_latest(run, publish):
    publish(run, 6)
    assert step_of(newest_checkpoint(run)) == 6
    assert (run / "checkpoints" / "latest").read_text() == "step-00000006\n"


def test_nothing_temporary_is_left(run, publish):
    folder = publish(run, 6)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest", "step-00000003", "step-00000006"]
    assert sorted(path.name for path in folder.iterdir()) == ["metadata.json", "rank-00000.safetensors"]


def test_what_a_killed_save_left_behind_is_removed(run, publish):
    (run / "checkpoints" / ".step-00000005.tmp").mkdir()
    publish(run, 6)
    assert steps(run) == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize(("keep", "kept"), [(1, [9]), (2, [6, 9]), (5, [1, 3, 6, 9]), (0, [1, 3, 6, 9])])
def test_the_newest_are_kept(tmp_path, keep, kept):
    with writer_of(tmp_path, keep=keep) as writer:
        for step in (1, 3, 6, 9):
            writer.save(step, ONE, {})
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
    assert step_of(newest_checkpoint(tmp_path)) == 4


def test_steps_that_a_run_passes_are_removed_as_another_runs(tmp_path, publish):
    """Taken back to step 3, a run must never fall back to the step 6 of before."""
    for step in (3, 6, 9):
        publish(tmp_path, step)
    with writer_of(tmp_path, start_step=3) as writer:
        writer.save(5, ONE, {})
        writer.finish()
        assert steps(tmp_path) == [f"step-{step:08d}" for step in (3, 5, 6, 9)]
        writer.save(8, ONE, {})
    assert steps(tmp_path) == [f"step-{step:08d}" for step in (3, 5, 8, 9)]


def test_every_rank_writes_its_file(tmp_path):
    whole = torch.arange(24.0).reshape(6, 4)
    folder = save_together(tmp_path, 1, cut("param/w", whole, 1, 2, 2), {"architecture": "any"})
    assert torch.equal(checkpoint_at(tmp_path).tensor("w"), whole)
    metadata = json.loads((folder / "metadata.json").read_text())
    assert [entry["name"] for entry in metadata["files"]] == [f"rank-{rank:05d}.safetensors" for rank in range(4)]
    assert (metadata["step"], metadata["architecture"]) == (1, "any")


def test_saving_returns_before_the_file_is_written(tmp_path, slow):
    with writer_of(tmp_path) as writer:
        writer.save(1, ONE, {})
        assert newest_checkpoint(tmp_path) is None
        slow.set()
    assert step_of(newest_checkpoint(tmp_path)) == 1


def test_what_is_saved_are_the_numbers_of_the_step(tmp_path, slow):
    weights = torch.zeros(4)
    with writer_of(tmp_path) as writer:
        writer.save(1, {"param/w": (Fragment((4,)), weights)}, {})
        weights += 1
        slow.set()
    assert checkpoint_at(tmp_path).tensor("w").tolist() == [0, 0, 0, 0]


def test_finish_waits_until_the_step_can_be_seen(tmp_path, slow):
    said: list[str] = []
    with writer_of(tmp_path, say=said.append) as writer:
        writer.save(1, ONE, {})
        assert not said
        slow.set()
        writer.finish()
        assert len(said) == 1 and said[0].startswith("step 1: checkpoint saved, written in ")
        assert step_of(newest_checkpoint(tmp_path)) == 1


def test_a_save_waits_for_the_one_before(tmp_path, monkeypatch):
    under_way: list[int] = []

    def write(folder: Path, rank: int, tensors: Any) -> dict[str, Any]:
        under_way.append(len(list(folder.parent.glob(".step-*"))))
        return write_rank_file(folder, rank, tensors)

    monkeypatch.setattr(writer_module, "write_rank_file", write)
    with writer_of(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.save(step, ONE, {})
    assert under_way == [1, 1, 1]


def test_where_memory_is_short_training_waits_and_the_log_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "available_memory", lambda: 20)
    said: list[str] = []
    with writer_of(tmp_path, say=said.append) as writer:
        for step in (1, 2):
            writer.save(step, ONE, {})
            assert step_of(newest_checkpoint(tmp_path)) == step
    assert [message for message in said if "saved" not in message] == said[:1]
    assert "written while training waits" in said[0]


def test_a_hosts_memory_must_do_for_all_its_ranks(tmp_path, monkeypatch):
    """Two ranks of 16 bytes each fit neither 24 bytes nor three quarters of 40."""
    for free, fits in ((24, False), (40, False), (48, True)):
        monkeypatch.setattr(writer_module, "available_memory", lambda free=free: free)
        writer = writer_of(tmp_path)
        assert writer._has_room([("host", 16, free), ("host", 16, free), ("other", 1, free)]) == fits


def test_memory_is_read_from_this_host():
    assert available_memory() > 2**20


def test_the_least_of_all_limits_around_the_process_counts(tmp_path, monkeypatch):
    """A step in the group of its job, as SLURM makes them: each version of control groups has files of its own."""
    monkeypatch.setattr(writer_module, "_CONTROL_GROUP", tmp_path / "cgroup")
    own, whole = tmp_path / "own", available_memory()
    assert whole > 2**20
    monkeypatch.setattr(writer_module, "_OWN_GROUPS", own)
    for text, folder, limit, used in (
        ("0::/slurm/job_7/step_0\n", "slurm/job_7", "memory.max", "memory.current"),
        (
            "5:cpu:/a\n4:memory:/slurm/job_8/step_0\n",
            "memory/slurm/job_8",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
        ),
    ):
        job = tmp_path / "cgroup" / folder
        (job / "step_0").mkdir(parents=True)
        (job / "step_0" / limit).write_text("max\n")
        (job / "step_0" / used).write_text("5\n")
        own.write_text(text)
        assert available_memory() > 2**20
        (job / limit).write_text("1000\n")
        (job / used).write_text("300\n")
        assert available_memory() == 700


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, FaultError), (errno.ENOSPC, CheckpointError)])
def test_storage_that_fails_is_a_fault_of_all_ranks_and_a_full_disk_is_the_users_to_mend(
    tmp_path, monkeypatch, number, kind
):
    def write(folder: Path, rank: int, tensors: Any) -> dict[str, Any]:
        if rank == 1 and "2" in folder.name:
            raise OSError(number, os.strerror(number))
        return write_rank_file(folder, rank, tensors)

    monkeypatch.setattr(writer_module, "write_rank_file", write)
    outcomes = on_three_ranks(tmp_path, lambda rank, writer: None)
    assert type(outcomes[1]) is kind and all(isinstance(it, FaultError) == (kind is FaultError) for it in outcomes)
    assert all("could not be written" in str(outcome) for outcome in outcomes)


def test_a_save_that_has_failed_is_known_before_the_next_one(tmp_path, monkeypatch):
    def write(folder: Path, rank: int, tensors: Any) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, "no space")

    writer = writer_of(tmp_path)
    writer.save(1, ONE, {})
    writer.finish()
    assert not writer.failed
    monkeypatch.setattr(writer_module, "write_rank_file", write)
    writer.save(2, ONE, {})
    wait(writer._under_way)
    assert writer.failed
    with pytest.raises(CheckpointError, match="no space"):
        writer.finish()
    assert not writer.failed


def test_nothing_is_copied_where_training_waits(tmp_path, monkeypatch):
    written: list[int] = []

    def write(folder: Path, rank: int, tensors: Any) -> dict[str, Any]:
        written.append(tensors["param/w"][1].data_ptr())
        return write_rank_file(folder, rank, tensors)

    monkeypatch.setattr(writer_module, "write_rank_file", write)
    with CheckpointWriter(tmp_path, CheckpointConfig(asynchronous=False), Topology(), 0, gather=alone) as writer:
        writer.save(1, ONE, {})
    assert written == [ONE["param/w"][1].data_ptr()]


@pytest.mark.parametrize("moment", ["write_rank_file", "write_atomically", "_sync_folder"])
def test_a_save_that_fails_leaves_the_checkpoint_before_valid(run, publish, monkeypatch, moment):
    monkeypatch.setattr(writer_module, moment, raising)
    with pytest.raises(CheckpointError, match="no space left on device.*Free disk space"):
        publish(run, 6)
    monkeypatch.undo()
    assert step_of(newest_checkpoint(run)) == 3
    assert newest_checkpoint(run).tensor("bias").tolist() == [0, 1, 2, 3, 4]
    publish(run, 6)
    assert step_of(newest_checkpoint(run)) == 6


def test_a_half_written_rank_file_leaves_the_checkpoint_before_valid(run, publish, monkeypatch):
    def half(folder: Path, rank: int, tensors: object) -> None:
        (folder / "rank-00000.safetensors").write_bytes(b"half")
        raise SafetensorError("killed")

    monkeypatch.setattr(writer_module, "write_rank_file", half)
    with pytest.raises(CheckpointError, match="killed"):
        publish(run, 6)
    assert step_of(newest_checkpoint(run)) == 3
    assert steps(run) == ["step-00000003"]


def on_three_ranks(run: Path, work: Callable[[int, CheckpointWriter], Any]) -> list[Any]:
    """What `work(rank, writer)` returns, or the exception it ends with, on ranks whose writers save step 1 first."""
    held = cut("param/w", torch.arange(6.0), 0, 1, 3)

    def start(rank: int, gather: Gather) -> Any:
        with CheckpointWriter(run, CheckpointConfig(keep=0), Topology(3, rank), 0, gather=gather) as writer:
            writer.save(1, held[rank], {})
            writer.finish()
            writer.save(2, held[rank], {})
            return work(rank, writer)

    return Ranks(3).run(start)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 cannot write step 2."""

    def write(folder: Path, rank: int, tensors: Any) -> dict[str, Any]:
        if rank == 1 and "2" in folder.name:
            raise OSError("no space left on device")
        return write_rank_file(folder, rank, tensors)

    monkeypatch.setattr(writer_module, "write_rank_file", write)


@pytest.mark.parametrize("then", [lambda rank, writer: writer.save(3, {}, {}), lambda rank, writer: None])
def test_a_full_disk_of_one_rank_is_raised_on_all_at_the_next_save_or_the_end(tmp_path, full_disk, then):
    outcomes = on_three_ranks(tmp_path, then)
    assert isinstance(outcomes[1], CheckpointError)
    assert all(isinstance(outcome, MegarqError) for outcome in outcomes), outcomes
    assert all("step-00000002.tmp could not be written (no space left on device)" in str(o) for o in outcomes)
    assert steps(tmp_path) == ["step-00000001"]
    assert checkpoint_at(tmp_path).tensor("w").tolist() == [0, 1, 2, 3, 4, 5]


def fail(rank: int, writer: CheckpointWriter) -> None:
    raise ZeroDivisionError


def test_an_exception_that_ends_the_run_lets_the_save_under_way_end_first(tmp_path):
    outcomes = on_three_ranks(tmp_path, fail)
    assert all(isinstance(outcome, ZeroDivisionError) for outcome in outcomes)
    assert step_of(newest_checkpoint(tmp_path)) == 2


def test_an_exception_that_ends_the_run_is_not_hidden_by_a_save_that_failed(tmp_path, full_disk, caplog):
    outcomes = on_three_ranks(tmp_path, fail)
    assert all(isinstance(outcome, ZeroDivisionError) for outcome in outcomes)
    assert "no space left on device" in caplog.text
    assert step_of(newest_checkpoint(tmp_path)) == 1


def test_rank_0_gives_up_where_no_rank_makes_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_PATIENCE", 0.05)
    given_up = Event()

    def write(folder: Path, rank: int, tensors: Any) -> dict[str, Any]:
        assert rank != 1 or "1" in folder.name or given_up.wait(SECONDS)
        return write_rank_file(folder, rank, tensors)

    def wait(rank: int, writer: CheckpointWriter) -> None:
        if rank == 0:
            writer._under_way[1].exception()
            given_up.set()

    monkeypatch.setattr(writer_module, "write_rank_file", write)
    outcomes = on_three_ranks(tmp_path, wait)
    assert all("no rank wrote for 0 s; still missing: [1]" in str(outcome) for outcome in outcomes), outcomes
    assert step_of(newest_checkpoint(tmp_path)) == 1


def test_rank_0_that_failed_does_not_wait_for_a_rank_that_died(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(writer_module, "_PATIENCE_AFTER_ERROR", 0.05)
    gone = Event()

    def write(folder: Path, rank: int, tensors: Any) -> dict[str, Any]:
        assert rank != 1 or "1" in folder.name or gone.wait(SECONDS)
        return write_rank_file(folder, rank, tensors)

    def die_or_fail(rank: int, writer: CheckpointWriter) -> None:
        if rank == 1:
            writer._under_way[0].exception()
        elif rank == 0:
            try:
                with writer:
                    raise ZeroDivisionError
            finally:
                gone.set()
        raise ZeroDivisionError

    monkeypatch.setattr(writer_module, "write_rank_file", write)
    outcomes = on_three_ranks(tmp_path, die_or_fail)
    assert all(isinstance(outcome, ZeroDivisionError) for outcome in outcomes)
    assert "still missing: [1]" in caplog.text
    assert step_of(newest_checkpoint(tmp_path)) == 1
