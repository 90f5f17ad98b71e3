"""Handing out shards: each made once, whoever asks, and none lost with a worker that dies."""

import errno
import fcntl
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from captioned_tars import contents

from megarq.data.code_writer import write_shard
from megarq.data.manifest import CodeSettings, Manifest, save_record
from megarq.data.sources import source_name
from megarq.errors import DataError
from megarq.pretokenize.crew import find_crew
from megarq.pretokenize.work import Work
from megarq.rqvae.model import RQVAE


@pytest.fixture
def work(settings: CodeSettings, tmp_path: Path) -> Work:
    """Eight shards to be made."""
    return Work(tmp_path, settings, [f"{index}.tar" for index in range(8)])


def make(work: Work, index: int, skipped: int = 0) -> None:
    """An empty shard and its record."""
    record = write_shard(work.folder, index, work.settings, source_name(work.sources[index]), [])
    save_record(work.folder, work.settings, replace(record, skipped=skipped))


def made_by(work: Work, shards: Generator[int, None, None]) -> list[int]:
    """What a worker makes that nobody disturbs."""
    made = []
    for index in shards:
        make(work, index)
        made.append(index)
    return made


def test_a_worker_takes_its_share_then_the_ends_of_the_others(work: Work) -> None:
    assert made_by(work, work.take(1, 3)) == [1, 4, 7, 5, 2, 6, 3, 0]


def test_a_slow_worker_holds_nothing_back_but_its_shard(work: Work) -> None:
    with closing(work.take(0, 2)) as slow:
        assert next(slow) == 0
        assert made_by(work, work.take(1, 2)) == [1, 3, 5, 7, 6, 4, 2]
        make(work, 0)
        assert list(slow) == []


def test_workers_of_the_same_number_make_every_shard_once(work: Work) -> None:
    made: list[int] = []
    with closing(work.take(0, 1)) as one, closing(work.take(0, 1)) as other:
        for index in (index for pair in zip(one, other, strict=False) for index in pair):
            made.append(index)
            make(work, index)
    assert sorted(made) == list(range(8))


def test_a_killed_workers_shard_is_free_again(work: Work) -> None:
    ours, theirs = multiprocessing.Pipe()

    def hold() -> None:
        shards = work.take(0, 1)
        theirs.send(next(shards))
        signal.pause()

    process = multiprocessing.get_context("fork").Process(target=hold, daemon=True)
    process.start()
    assert ours.recv() == 0
    with closing(work.take(0, 1)) as shards:
        assert next(shards) == 1
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert list(shards)[-1] == 0


def test_a_folder_that_others_still_fill_is_left_to_them(work: Work, rqvae: RQVAE) -> None:
    with closing(work.take(0, 2)) as slow:
        next(slow)
        made_by(work, work.take(1, 2))
        assert work.finish(rqvae, {}, 0.01) is None
    assert not (work.folder / "manifest.json").exists()


def test_a_shard_that_another_worker_completed_is_not_made_again(
    run: Callable[..., Manifest], rqvae: RQVAE, sources: list[str], settings: CodeSettings, tmp_path: Path
) -> None:
    run(given=sources[:2])
    late = Work(tmp_path / "codes", settings, sources)
    run(given=sources)
    assert list(late.take(0, 1)) == []


def test_completing_a_folder_leaves_half_files_of_others_alone(
    run: Callable[..., Manifest], sources: list[str], settings: CodeSettings, tmp_path: Path
) -> None:
    run()
    half = tmp_path / "codes" / ".000001.tar.tmp"
    half.write_bytes(b"half")
    (tmp_path / "codes" / "000001.tar").rename(tmp_path / "away")
    with closing(Work(tmp_path / "codes", settings, sources).take(0, 1)) as busy:
        assert next(busy) == 1
        (tmp_path / "away").rename(tmp_path / "codes" / "000001.tar")
        run()
        assert half.exists()
    run()
    assert not half.exists()


def test_a_file_named_twice_is_refused(settings: CodeSettings, sources: list[str], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(Path(sources[0]).parent)
    with pytest.raises(DataError, match=r"--data names .*00000\.tar 2 times"):
        Work(tmp_path, settings, [*sources, str(tmp_path / "link" / "00000.tar")])


def test_bad_samples_are_judged_over_all_workers_shards(work: Work, rqvae: RQVAE) -> None:
    for index in range(8):
        make(work, index, skipped=1)
    with pytest.raises(DataError, match="8 bad samples of 8 seen"):
        work.finish(rqvae, {}, 0.01)


def test_only_shards_that_nobody_could_read_are_named(work: Work, rqvae: RQVAE) -> None:
    for index in range(7):
        make(work, index)
    with pytest.raises(DataError, match=r"^1 of 8 image shards could not be read:\n    7\.tar: no route"):
        work.finish(rqvae, {6: "no route", 7: "no route"}, 0.01)


def test_a_file_system_without_locks_is_named(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(DataError, match=r"without locks .*mount it with locks \(Lustre: -o flock\)"):
        next(work.take(0, 1))
    assert not any(name.endswith(".tar") for name in contents(work.folder))


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, (0, 1)),
        ({"SLURM_STEP_ID": 0, "SLURM_PROCID": 3, "SLURM_NTASKS": 4}, (3, 4)),
        ({"SLURM_ARRAY_TASK_ID": 7, "SLURM_ARRAY_TASK_MIN": 5, "SLURM_ARRAY_TASK_COUNT": 4}, (2, 4)),
        (
            {"SLURM_ARRAY_TASK_ID": 4, "SLURM_ARRAY_TASK_COUNT": 3, "SLURM_ARRAY_TASK_STEP": 2}
            | {"SLURM_STEP_ID": 0, "SLURM_PROCID": 1, "SLURM_NTASKS": 2},
            (5, 6),
        ),
        ({"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1}, (1, 2)),
    ],
    ids=["alone", "srun", "array", "srun in an array with steps", "torchrun"],
)
def test_a_workers_number_comes_from_its_launcher(environ: dict[str, int], place: tuple[int, int]) -> None:
    crew = find_crew({name: str(value) for name, value in environ.items()})
    assert (crew.number, crew.workers) == place
