"""Training that is asked to stop, hangs or is killed, by its real command on two ranks, and driven to its end."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from followed_runs import events, expect_same_run, last_step
from little_space import little_space

from megarq import cli
from megarq.checkpoint.format import Checkpoint
from megarq.checkpoint.run_folder import checkpoint_at, newest_checkpoint
from megarq.engine import run_lock, session
from megarq.engine.loop import Trainer
from megarq.engine.transformer_task import TransformerTask
from megarq.launch.stop import STOPPED
from megarq.launch.watchdog import HUNG
from tests.end_to_end.jobs import PATIENCE, RANKS, Job, Training

STEPS, SAVED_EVERY = 60, 4
HANG_SECONDS = 2


@pytest.fixture(scope="module")
def training(tiny_training: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    options = [f"checkpoint.every={SAVED_EVERY}", "checkpoint.keep=0", "data.workers=0", "train.ema_decay=0.9"]
    training = Training([*tiny_training, f"train.steps={STEPS}", *options], tmp_path_factory.mktemp("faults"), [])
    yield training
    training.end()


@pytest.fixture(scope="module")
def undisturbed(training: Training) -> Path:
    training.finish(training.folder / "undisturbed")
    return training.folder / "undisturbed"


@pytest.fixture
def run(training: Training, tmp_path: Path) -> Path:
    return tmp_path / "run"


def send_to_one(job: Job, number: signal.Signals) -> None:
    pid = job.ranks[-1].pid
    assert pid is not None
    os.kill(pid, number)


def send_to_groups(job: Job, number: signal.Signals) -> None:
    """As SLURM does: every rank, and the workers that it started."""
    for rank in job.ranks:
        assert rank.pid is not None
        os.killpg(rank.pid, number)


@pytest.mark.parametrize(
    ("number", "send", "workers"),
    [(signal.SIGUSR1, send_to_one, 0), (signal.SIGTERM, send_to_groups, 1), (signal.SIGINT, send_to_groups, 1)],
    ids=["USR1 to one", "TERM to all and their workers", "Ctrl-C"],
)
def test_a_run_that_is_asked_to_stop_saves_the_step_and_goes_on_from_it(
    training, undisturbed, run, record, number, send, workers
):
    job = training.start(run, f"data.workers={workers}")
    job.wait_until(lambda: last_step(run) > SAVED_EVERY)
    asked_at, start = last_step(run), time.monotonic()
    send(job, number)
    assert job.statuses() == [STOPPED] * RANKS, job.said
    seconds = time.monotonic() - start
    (stopped,) = events(run, "stopped")
    assert asked_at <= stopped["step"] == last_step(run) == checkpoint_at(run).metadata["step"] < STEPS
    assert f"step {stopped['step']}: asked to stop; saved" in job.said and "Traceback" not in job.said
    record("faults", {"fault": f"{number.name}, workers {workers}", "ends": "saved, status 75", "seconds": seconds})
    training.finish(run)
    assert events(run, "started")[-1]["step"] == stopped["step"]
    expect_same_run(run, undisturbed)


def test_a_signal_before_the_first_step_is_not_lost(training, undisturbed, run):
    job = training.start(run)
    job.wait_until(lambda: "megarq" in job.said or run.exists())
    send_to_groups(job, signal.SIGTERM)
    assert job.statuses() == [STOPPED] * RANKS, job.said
    assert events(run, "stopped")[0]["step"] == checkpoint_at(run).metadata["step"]
    training.finish(run)
    expect_same_run(run, undisturbed)


def hanging(rank: int, in_step: int) -> Callable[..., Any]:
    """Trainer._update, in which one rank never comes to an end."""
    update = Trainer._update

    def endless(self: Trainer, batch: Any) -> Any:
        while self.groups.topology.rank == rank and self.step + 1 == in_step:
            time.sleep(0.01)
        return update(self, batch)

    return endless


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_rank_that_hangs_is_named_with_step_and_collective_and_the_job_ends(
    training, undisturbed, run, record, monkeypatch, rank
):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", hanging(rank, SAVED_EVERY + 2))
        job = training.start(run, f"faults.hang_seconds={HANG_SECONDS}")
    job.wait_until(lambda: last_step(run) == SAVED_EVERY + 1)
    start = time.monotonic()
    assert job.statuses() == [HUNG] * RANKS, job.said
    record("faults", {"fault": f"rank {rank} hangs", "ends": "status 76", "seconds": time.monotonic() - start})
    (failed,) = events(run, "failed")
    assert failed["text"].startswith(f"HANG: rank {rank} (")
    hung, waits = failed["text"].split("; the others wait in ")
    assert f"step {SAVED_EVERY + 2}, waiting for data" in hung and "test_faults" not in waits
    assert f"step {SAVED_EVERY + 2}, forward and backward, all_reduce (passes.py:" in waits
    assert failed["text"] in job.said
    stacks = (run / "hangs" / f"rank-{rank:05d}.txt").read_text()
    assert "in endless" in stacks
    assert checkpoint_at(run).metadata["step"] == SAVED_EVERY
    training.finish(run)
    expect_same_run(run, undisturbed)
    assert (run / "hangs.before" / f"rank-{rank:05d}.txt").read_text() == stacks


def hanging_read(rank: int) -> Callable[..., Any]:
    """Checkpoint.read, which on one rank never comes to an end."""
    read = Checkpoint.read

    def endless(self: Checkpoint, *args: Any) -> Any:
        while os.environ["RANK"] == str(rank):
            time.sleep(0.01)
        return read(self, *args)

    return endless


def test_a_rank_that_hangs_before_the_first_step_is_named_too(training, undisturbed, run, monkeypatch):
    shutil.copytree(undisturbed, run)
    more = f"train.steps={STEPS + 1}"
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read", hanging_read(1))
        patch.setattr(session, "SLOWER", 5)
        job = training.start(run, more, f"faults.hang_seconds={HANG_SECONDS}")
    assert job.statuses() == [HUNG] * RANKS, job.said
    (failed,) = events(run, "failed")
    where = f"step {STEPS}, preparing to go on from {checkpoint_at(run).folder.name}"
    assert failed["text"].startswith("HANG: rank 1 (") and failed["text"].count(where) == 2, failed
    training.finish(run, more)
    assert last_step(run) == STEPS + 1


def test_a_second_job_is_refused_while_one_trains_into_the_folder(training, run, monkeypatch):
    job = training.start(run, "train.steps=100000")
    job.wait_until(lambda: last_step(run) > SAVED_EVERY)
    with monkeypatch.context() as patch:
        patch.setattr(run_lock.RunLock.take, "__defaults__", (0.5,))
        second = training.start(run)
    assert second.statuses() == [cli.HELD, 1], second.said
    assert f'{run} is being trained into by {{"host": ' in second.said and str(job.ranks[0].pid) in second.said
    send_to_one(job, signal.SIGTERM)
    assert job.statuses() == [STOPPED] * RANKS, job.said
    assert len(events(run, "started")) == 1


def test_a_rank_that_is_stopped_with_its_watchdog_is_named_by_the_others(training, run, record):
    job = training.start(run, f"faults.hang_seconds={HANG_SECONDS}")
    job.wait_until(lambda: last_step(run) > SAVED_EVERY)
    start = time.monotonic()
    send_to_one(job, signal.SIGSTOP)
    job.ranks[0].join(PATIENCE)
    seconds = time.monotonic() - start
    job.ranks[1].kill()
    assert job.statuses() == [HUNG, -signal.SIGKILL], job.said
    record("faults", {"fault": "rank 1 stopped by SIGSTOP", "ends": "status 76", "seconds": seconds})
    assert "HANG: rank 1 gave no report in step" in events(run, "failed")[0]["text"]


def undefined_from(step: int) -> Callable[..., Any]:
    """TransformerTask._objective, whose losses are not numbers any more from a step on."""
    objective = TransformerTask._objective

    def spoiled(self: TransformerTask, *args: Any) -> dict[str, Any]:
        terms = objective(self, *args)
        return {name: value * float("nan") for name, value in terms.items()} if made(self) + 1 >= step else terms

    return spoiled


def made(task: TransformerTask) -> int:
    """Steps that the optimiser made."""
    return int(task._engine.global_steps)


def test_losses_that_are_never_numbers_again_end_the_run_with_its_checkpoints(
    training, undisturbed, run, record, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(TransformerTask, "_objective", undefined_from(SAVED_EVERY + 2))
        job = training.start(run, "faults.skipped_steps=1", "faults.rollbacks=1")
    job.wait_until(lambda: events(run, "skipped"))
    start = time.monotonic()
    assert job.statuses() == [2] * RANKS, job.said
    record("faults", {"fault": "every loss NaN", "ends": "status 2", "seconds": time.monotonic() - start})
    assert [event["to"] for event in events(run, "rolled back")] == [SAVED_EVERY]
    assert "loss is nan" in events(run, "failed")[0]["text"] and checkpoint_at(run).metadata["step"] == SAVED_EVERY
    training.finish(run)
    expect_same_run(run, undisturbed)


def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(training, undisturbed, tmp_path, record, request):
    files = checkpoint_at(undisturbed).folder.iterdir()
    run, checkpoint = tmp_path / "disk" / "run", sum(file.stat().st_size for file in files)
    request.addfinalizer(lambda: subprocess.run(["umount", str(run.parent)], capture_output=True))
    with little_space(run.parent, round(4.5 * checkpoint)):
        if not run.parent.is_mount():
            pytest.skip("a disk that fills up is needed, which root alone may mount")
        job = training.start(run)
        job.wait_until(lambda: last_step(run) >= 2 * SAVED_EVERY)
        first, _ = job.statuses()
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[last_step(run) - 1])["time"]
        record("faults", {"fault": "disk full", "ends": "status 2", "seconds": time.time() - last})
        # Whichever comes first finds it: the metrics on rank 0, which alone ends clearly, or the checkpoint on all.
        assert first == 2 and ("No space left on device. Check" in job.said or "Free disk space" in job.said), job.said
        assert "Errno" not in job.said.partition("error: ")[2].partition("\n")[0], job.said
        newest = newest_checkpoint(run)
        assert newest is not None and 0 < newest.metadata["step"] <= last_step(run)
    training.finish(run)
    expect_same_run(run, undisturbed)


class Kill(NamedTuple):
    """One kill of one rank."""

    moment: str
    """"saving": while a checkpoint is written; "stepping": at any moment between two saves; "starting"."""
    rank: int
    started_at: int
    """The step that its job goes on from."""
    seen: int
    """The last step in the metrics when it came."""
    saved: int
    """The step that could be gone back to, after it."""
    seconds: float | None
    """From the kill to the end of the other rank by itself; while it waits for others to join, the launcher ends it."""


MOMENTS = "saving", "stepping", "saving", "starting"
"""Of kills, in turn."""


def half_saved(run: Path, since: float = 0) -> bool:
    """Whether a checkpoint is being written."""
    return any(path.stat().st_mtime > since for path in (run / "checkpoints").glob(".step-*"))


def killed(training: Training, run: Path, at: int, moment: str, source: random.Random) -> Kill:
    """Go on with a run, and kill one rank at a random moment: of its start, or after a step."""
    before, starts = newest_checkpoint(run), len(events(run, "started"))
    job, start = training.start(run), time.time()
    if moment != "starting":
        after = at + source.randrange(3)
        job.wait_until(lambda: len(events(run, "started")) > starts and last_step(run) >= after)
    if moment == "saving":
        with suppress(FileNotFoundError):  # published while we look
            job.wait_until(lambda: half_saved(run, since=start))
    time.sleep({"saving": 0.003, "stepping": 0.03, "starting": 0.5}[moment] * source.random())
    rank = source.randrange(RANKS)
    job.ranks[rank].kill()
    seen, begun, killed_at = last_step(run), len(events(run, "started")) > starts, time.monotonic()
    if not begun:
        job.ranks[1 - rank].kill()
    statuses = job.statuses()
    seconds = time.monotonic() - killed_at if begun else None
    assert statuses[rank] == -signal.SIGKILL and statuses[1 - rank] not in (0, None, STOPPED), job.said
    saved = newest_checkpoint(run)
    assert saved is not None
    return Kill(moment, rank, before.metadata["step"] if before else 0, seen, saved.metadata["step"], seconds)


def expect_kills_leave_no_trace(training: Training, undisturbed: Path, run: Path, count: int, record: Any) -> None:
    source, kills = random.Random(9), []
    for number in range(count):
        at = SAVED_EVERY + 1 + round((STEPS - 3 * SAVED_EVERY) * (number + source.random()) / count)
        kills.append(killed(training, run, at, MOMENTS[number % len(MOMENTS)], source))
    training.finish(run)
    starts = [event["step"] for event in events(run, "started")]
    assert starts == [kill.started_at for kill in kills if kill.seconds is not None] + [kills[-1].saved]
    # The checkpoint of a step is written while the next steps are made, one after the other.
    assert all(kill.seen - kill.saved < 2 * SAVED_EVERY for kill in kills), kills
    assert {kill.rank for kill in kills} == set(range(RANKS)), kills
    for kill in kills:
        record("kills", {"of": count} | kill._asdict())
    expect_same_run(run, undisturbed)


def test_three_kills_of_a_random_rank_leave_no_trace(training, undisturbed, run, record):
    expect_kills_leave_no_trace(training, undisturbed, run, 3, record)


@pytest.mark.full
def test_twenty_kills_of_a_random_rank_leave_no_trace(training, undisturbed, run, record):
    expect_kills_leave_no_trace(training, undisturbed, run, 20, record)
