"""Checkpoints of real engines: each rank reads its own numbers alone, training goes on while a step is written, and
whatever happens to a save, the run goes on from the newest whole one with the losses of a run that nothing happened to.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import patch

import pytest
import tiny_runs
import torch
from gloo_ranks import RankError
from tiny_runs import Metrics, ds_config, engine_run, largest_deviation, metrics_of, tiny_config

from megarq.checkpoint import format, writer
from megarq.checkpoint.run_folder import checkpoint_at
from megarq.config.run import CheckpointConfig, ParallelConfig
from megarq.engine import state
from megarq.errors import MegarqError

EVERY, DAMAGED = 2, 4
SECONDS = 60
CONFIG = replace(tiny_config(ema_decay=0.8), checkpoint=CheckpointConfig(every=EVERY, keep=0))
ZERO_2 = ds_config(2)


@pytest.fixture(scope="module")
def expected(rank_group: Callable, tmp_path_factory: pytest.TempPathFactory) -> Metrics:
    """Metrics of a run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    rank_group(2).run(engine_run, run, CONFIG, ZERO_2)
    return metrics_of(run)


@contextmanager
def before_writing(act: Callable[[Path, int], None]) -> Iterator[None]:
    """`act(folder, rank)` in every writing thread of this process, before it writes its file."""
    write = writer.write_rank_file

    def acting(folder: Path, rank: int, tensors: Any) -> dict[str, Any]:
        act(folder, rank)
        return write(folder, rank, tensors)

    with patch.object(writer, "write_rank_file", acting):
        yield


def is_of(folder: Path, step: int) -> bool:
    return f"{step:08d}" in folder.name


def train_killed_before_publishing(run: Path) -> None:
    collect = writer.CheckpointWriter._collect

    def kill(self: writer.CheckpointWriter, temporary: Path) -> list[dict[str, Any]]:
        files = collect(self, temporary)
        if is_of(temporary, DAMAGED):
            os.kill(os.getpid(), signal.SIGKILL)
        return files

    with patch.object(writer.CheckpointWriter, "_collect", kill):
        engine_run(run, CONFIG, ZERO_2)


def train_on_a_full_disk(run: Path, asynchronous: bool) -> str:
    """The message that this rank's run ends with."""

    def fill(folder: Path, rank: int) -> None:
        if rank == 1 and is_of(folder, DAMAGED):
            raise OSError("No space left on device")

    config = replace(CONFIG, checkpoint=replace(CONFIG.checkpoint, asynchronous=asynchronous))
    with before_writing(fill), pytest.raises(MegarqError) as failure:
        engine_run(run, config, ZERO_2)
    return str(failure.value)


def train_with_a_writer_that_waits_for_a_later_step(run: Path) -> None:
    """The writer of step 2 starts when the loader is asked for the batch of step 4."""
    later, make = Event(), tiny_runs.global_batch

    def wait(folder: Path, rank: int) -> None:
        if is_of(folder, EVERY) and not later.wait(SECONDS):
            raise OSError("training did not go on")

    def batch(config: Any, number: int) -> Any:
        if number == EVERY + 1:
            later.set()
        return make(config, number)

    with before_writing(wait), patch.object(tiny_runs, "global_batch", batch):
        engine_run(run, CONFIG, ZERO_2)


def resume_counting(run: Path, ds: dict[str, Any], parallel: ParallelConfig) -> int:
    """Numbers that this rank reads to go on."""
    read, count = format.read_numbers, [0]

    def counting(file: Any, stored: Any, start: int, into: Any) -> None:
        count[0] += into.numel()
        read(file, stored, start, into)

    with patch.object(format, "read_numbers", counting):
        engine_run(run, CONFIG, ds, parallel)
    return count[0]


def expect_resume(rank_group: Callable, run: Path, expected: Metrics) -> None:
    """Go on with the run as it is; its metrics are those of a whole one."""
    rank_group(2).run(engine_run, run, CONFIG, ZERO_2)
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3, 4, 5, 6]
    assert largest_deviation(metrics_of(run), expected) < 1e-6
    assert not list((run / "checkpoints").glob(".step-*"))
    assert checkpoint_at(run, DAMAGED).metadata["step"] == DAMAGED


def test_killed_between_writing_and_publishing(rank_group, run, expected):
    with pytest.raises(RankError, match=f"exit code -{signal.SIGKILL}"):
        rank_group(2).run(train_killed_before_publishing, run)
    left = sorted(path.name for path in (run / "checkpoints").glob("*step*"))
    assert left == [".step-00000004.tmp", "step-00000002"]
    expect_resume(rank_group, run, expected)


def test_newest_rank_file_damaged(rank_group, run, expected):
    rank_group(2).run(engine_run, run, CONFIG, ZERO_2, None, DAMAGED + 1)
    path = run / "checkpoints" / "step-00000004" / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    expect_resume(rank_group, run, expected)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_disk_of_one_rank_full(rank_group, run, expected, asynchronous):
    messages = rank_group(2).run(train_on_a_full_disk, run, asynchronous)
    for message in messages:
        assert "could not be written (No space left on device); the checkpoint before it is whole" in message
    assert checkpoint_at(run).metadata["step"] == EVERY
    expect_resume(rank_group, run, expected)


def test_training_goes_on_while_a_step_is_written(rank_group, run, expected):
    rank_group(2).run(train_with_a_writer_that_waits_for_a_later_step, run)
    assert largest_deviation(metrics_of(run), expected) == 0
    assert [checkpoint_at(run, step).metadata["step"] for step in (2, 4, 6)] == [2, 4, 6]


def go_back_in_a_live_engine(run: Path) -> list[str]:
    """Parameters that this rank holds whole after step 5, as ZeRO-3 keeps small ones, and that have step 2's values."""
    update, refreshed = state.EngineState.update_ema, []

    def go_back(self: state.EngineState) -> None:
        update(self)
        if self.fragments.optimizer_step() == 5:
            checkpoint = checkpoint_at(run, EVERY)
            self.load(checkpoint)
            for name, p in self.module.named_parameters():
                if torch.equal(p.data, checkpoint.tensor(name)):
                    refreshed.append(name)

    with patch.object(state.EngineState, "update_ema", go_back):
        engine_run(run, CONFIG, {"zero_optimization": {"stage": 3}})
    return refreshed


def test_parameters_that_stage_3_keeps_whole_are_refreshed(rank_group, run):
    refreshed = rank_group(2).run(go_back_in_a_live_engine, run)
    assert sorted(refreshed[0]) == sorted(refreshed[1]) == checkpoint_at(run).names()


@pytest.mark.parametrize(
    ("ds", "parallel"),
    [(ds_config(1), ParallelConfig()), (ds_config(3), ParallelConfig()), (ds_config(1), ParallelConfig(pp=2))],
    ids=["ZeRO-1", "ZeRO-3", "pp2"],
)
def test_ranks_read_every_number_once_in_all(rank_group, run, ds, parallel):
    rank_group(2).run(engine_run, run, CONFIG, ZERO_2, None, DAMAGED + 1)
    read = rank_group(2, f"pp{parallel.pp}").run(resume_counting, run, ds, parallel)
    checkpoint = checkpoint_at(run)
    kinds = ("param", "exp_avg", "exp_avg_sq", "ema")
    total = sum(checkpoint.tensor(name, kind).numel() for kind in kinds for name in checkpoint.names(kind))
    assert sum(read) == total
    assert max(read) < (0.6 if parallel.pp == 1 else 0.9) * total
