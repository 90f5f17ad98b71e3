"""Code shards that vanish, are cut or rot while two ranks train on them, by the real command."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from followed_runs import events, expect_same_run, last_step
from tiny_training import write_tiny_training

from megarq.checkpoint.run_folder import checkpoint_at
from tests.end_to_end.jobs import RANKS, Training

STEPS, SAVED_EVERY = 40, 4
SHARD = "000001.tar"


class Codes:
    """A folder of two code shards that the ranks have open; damage is done in place, as a disk does it."""

    def __init__(self, folder: Path) -> None:
        self.shard = folder / SHARD
        self._whole = self.shard.read_bytes()

    def overwrite(self, content: bytes) -> None:
        with self.shard.open("r+b") as file:
            file.write(content)
            file.truncate()

    def cut(self) -> None:
        self.overwrite(self._whole[:700])

    def rot(self) -> None:
        """Every bit of every byte flips."""
        self.overwrite(bytes(255 - byte for byte in self._whole))

    def mend(self) -> None:
        self.overwrite(self._whole)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    folder = tmp_path_factory.mktemp("lost")
    changes = [f"train.steps={STEPS}", f"checkpoint.every={SAVED_EVERY}", "checkpoint.keep=0", "train.ema_decay=0.9"]
    training = Training([*write_tiny_training(folder), "data.workers=1", *changes], folder, [])
    yield training
    training.end()


@pytest.fixture
def codes(training: Training) -> Iterator[Codes]:
    codes = Codes(training.folder / "codes")
    yield codes
    codes.mend()


@pytest.fixture(scope="module")
def undisturbed(training: Training) -> Path:
    training.finish(training.folder / "undisturbed")
    return training.folder / "undisturbed"


def lost_samples(run: Path) -> list[int]:
    return [json.loads(line)["lost_samples"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("damage", "reason"), [(Codes.cut, "truncated"), (Codes.rot, "a block is damaged")], ids=["cut", "rot"]
)
def test_a_run_goes_on_without_a_shard_that_is_damaged(training, codes, tmp_path, record, damage, reason):
    run = tmp_path / "run"
    job = training.start(run, "data.retry_seconds=0.5", "data.max_lost_rate=1")
    job.wait_until(lambda: last_step(run) > SAVED_EVERY)
    damage(codes)
    assert job.statuses() == [0] * RANKS, job.said
    lost = lost_samples(run)
    assert len(lost) == STEPS and sum(lost[:SAVED_EVERY]) == 0 and 0 < sum(lost) <= 16 * STEPS
    warnings = [event["text"] for event in events(run, "warning") if SHARD in event["text"]]
    assert warnings and all(reason in text and "other samples stand in" in text for text in warnings)
    assert checkpoint_at(run).metadata["step"] == STEPS
    record("faults", {"fault": f"a shard is damaged ({reason})", "ends": "goes on, other samples stand in"})


def test_a_shard_that_is_away_for_a_moment_leaves_no_trace(training, undisturbed, codes, tmp_path):
    run = tmp_path / "run"
    job = training.start(run)
    job.wait_until(lambda: last_step(run) > SAVED_EVERY)
    codes.cut()
    job.wait_until(lambda: "Trying again for" in job.said)
    codes.mend()
    assert job.statuses() == [0] * RANKS, job.said
    assert set(lost_samples(run)) == {0}
    expect_same_run(run, undisturbed)


def test_a_run_that_loses_too_much_ends_and_goes_on_when_the_shard_is_mended(
    training, undisturbed, codes, tmp_path, record
):
    run = tmp_path / "run"
    job = training.start(run, "data.max_lost_rate=0")
    job.wait_until(lambda: last_step(run) > SAVED_EVERY)
    codes.rot()
    start = time.monotonic()
    assert job.statuses() == [2] * RANKS, job.said
    record("faults", {"fault": "more lost than allowed", "ends": "status 2", "seconds": time.monotonic() - start})
    assert job.said.count("error") == 1 and "cannot be read, more than data.max_lost_rate=0 allows" in job.said
    assert SHARD in events(run, "failed")[0]["text"]
    codes.mend()
    training.finish(run)
    expect_same_run(run, undisturbed)


def test_a_new_run_refuses_a_missing_shard_and_one_that_goes_on_does_without(training, tmp_path):
    folder, run = tmp_path / "codes", tmp_path / "run"
    shutil.copytree(training.folder / "codes", folder)
    options = [str(folder) if option == str(training.folder / "codes") else option for option in training.options]
    moved = training._replace(options=[*options, "data.retry_seconds=0.1", "data.max_lost_rate=1"])
    moved.finish(run, "train.steps=8")
    (folder / SHARD).unlink()
    refused = moved.start(tmp_path / "other")
    assert refused.statuses() == [2] * RANKS and f"missing code shard {folder / SHARD}" in refused.said
    job = moved.finish(run, "train.steps=16")
    assert f"going on without a shard: missing code shard {folder / SHARD}" in job.said
    assert sum(lost_samples(run)[8:]) > 0
    (tmp_path / "exclude.txt").write_text("7\n")
    job = moved.finish(run, "train.steps=20", "--exclude-keys", tmp_path / "exclude.txt")
    assert "None of the 50 samples of a block are left out" in job.said and "1 of 100 samples are left out" in job.said
    (folder / "000000.tar").unlink()
    for least, status, said in (
        (
            "data.max_lost_rate=0.9",
            2,
            "100 samples of an epoch of 100 cannot be read, more than data.max_lost_rate=0.9",
        ),
        ("data.max_lost_rate=1", 1, "samples drawn in place of one that cannot be read can be read either"),
    ):
        job = moved.start(run, "train.steps=24", least)
        assert job.statuses() == [status] * RANKS and said in job.said, job.said
