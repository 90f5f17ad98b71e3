"""Blocks that cannot be read any more: when they are given up, and what stands in for their samples."""

from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest

from megarq.data import lost
from megarq.data.code_shards import CodeShards, ShardError
from megarq.data.loader import CodeBatch, CodeLoader, validation_batches
from megarq.data.lost import CALM, LostBlocks, stand_ins
from megarq.data.mixture import Mixture
from megarq.errors import StorageError

MakeCodes = Callable[..., CodeShards]
RETRY = 30.0


class Clock:
    """Time that passes in sleep alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(lost.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(lost.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def failing(clock: Clock, until: float, blocks: list[int], passing: bool = True) -> Callable[[], str]:
    """A read that fails up to some time."""

    def read() -> str:
        if clock.now < until:
            raise ShardError("shard 3 is gone.", blocks, passing)
        return "whole"

    return read


def test_a_file_that_comes_back_in_time_is_not_lost(clock: Clock) -> None:
    blocks, start = LostBlocks(9, RETRY), clock.now
    assert blocks.read(failing(clock, start + RETRY - 1, [3, 4])) == "whole"
    assert start + RETRY - 1 <= clock.now <= start + RETRY
    assert not blocks.mask.any() and blocks.news == []


def test_a_file_that_stays_away_is_lost_whole_and_told_once(clock: Clock) -> None:
    blocks, start = LostBlocks(9, RETRY), clock.now
    assert blocks.read(failing(clock, np.inf, [3, 4])) is None
    assert clock.now == start + RETRY
    assert np.flatnonzero(blocks.mask).tolist() == [3, 4]
    (line,) = blocks.news
    assert line.endswith(": shard 3 is gone.")
    assert blocks.read(failing(clock, np.inf, [3, 4])) is None and len(blocks.news) == 1


def test_nothing_is_waited_for_soon_after_a_loss(clock: Clock) -> None:
    blocks = LostBlocks(9, RETRY)
    blocks.read(failing(clock, np.inf, [3]))
    lost_at = clock.now
    assert blocks.read(failing(clock, np.inf, [5])) is None and clock.now == lost_at
    clock.sleep(CALM * RETRY)
    assert blocks.read(failing(clock, clock.now + 3, [6])) == "whole"
    assert np.flatnonzero(blocks.mask).tolist() == [3, 5]


def test_a_damaged_block_is_read_once_more_at_once(clock: Clock) -> None:
    blocks, start, tries = LostBlocks(9, RETRY), clock.now, []

    def read(heals: bool) -> str:
        tries.append(heals)
        if heals and len(tries) == 2:
            return "whole"
        raise ShardError("rotten.", [2])

    assert blocks.read(lambda: read(True)) == "whole" and not blocks.mask.any()
    tries.clear()
    assert blocks.read(lambda: read(False)) is None and len(tries) == 2
    assert clock.now == start and np.flatnonzero(blocks.mask).tolist() == [2]


def test_stand_ins_are_drawn_evenly_from_all_samples_and_follow_from_sample_epoch_and_key() -> None:
    sizes, count = np.array([3, 0, 5, 2]), 50_000
    block, row = np.full(count, 2), np.arange(count)
    chosen = stand_ins(block, row, np.zeros_like(row), sizes, 7, 0)
    assert (chosen[1] < sizes[chosen[0]]).all() and (chosen[1] >= 0).all()
    counts = np.bincount((np.cumsum(sizes) - sizes)[chosen[0]] + chosen[1], minlength=10)
    assert len(counts) == 10 and ((counts - count / 10) ** 2 / (count / 10)).sum() < 27.9  # chi-square, p 0.001
    again = stand_ins(block[:9], row[:9], np.zeros_like(row[:9]), sizes, 7, 0)
    assert np.array_equal(again, np.stack(chosen)[:, :9])
    for other in (
        stand_ins(block - 2, row, np.zeros_like(row), sizes, 7, 0),
        stand_ins(block, row, np.ones_like(row), sizes, 7, 0),
        stand_ins(block, row, np.zeros_like(row), sizes, 7, 1),
        stand_ins(block, row, np.zeros_like(row), sizes, 8, 0),
    ):
        assert (np.stack(other) == np.stack(chosen)).all(0).mean() < 0.2


def encode_caption(caption: str, seed: int | None) -> list[int]:
    """[number in the caption, 0 without one]."""
    return [int("".join(filter(str.isdigit, caption)) or 0)]


OPTIONS = {"caption_encoder": encode_caption, "cond_length": 1, "global_batch_size": 40, "seed": 5}
"""Epochs of ten batches."""


def batches(codes: CodeShards | Mixture, count: int, **changes: object) -> list[CodeBatch]:
    data = codes if isinstance(codes, Mixture) else Mixture([codes])
    return list(
        islice(
            CodeLoader(data, **OPTIONS | {"condition": "text", "lost": LostBlocks(len(data.block_sizes), 0)} | changes),
            count,
        )
    )  # type: ignore[arg-type]


def remove(codes: CodeShards, file: str) -> CodeShards:
    (codes.folder / file).unlink()
    return CodeShards.open(codes.folder)


def rot(codes: CodeShards, file: str) -> CodeShards:
    """Every byte of every sample is another."""
    path = codes.folder / file
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
    return CodeShards.open(codes.folder)


@pytest.mark.parametrize("damage", [remove, rot])
@pytest.mark.parametrize(
    "changes",
    [
        {"targets": "draws"},
        {"targets": "draws", "condition": "class"},
        {"targets": "draws", "workers": 2},
        {"targets": "soft"},
        {"targets": "argmin", "condition": "none", "world_size": 2, "rank": 1},
    ],
    ids=["captions", "classes", "workers", "latents", "no condition"],
)
def test_others_stand_in_for_the_samples_of_a_lost_shard(make_codes: MakeCodes, damage, changes) -> None:
    """Samples 100 to 199 of 400 are lost; the others come when they would have come."""
    codes = make_codes([[60, 40], [70, 30], [200]])
    whole = batches(codes, 20, **changes)
    found = batches(damage(codes, "000001.tar"), 20, **changes)
    assert 0 < sum(batch.lost for batch in found) <= 200
    for batch, expected in zip(found, whole, strict=True):
        ids, wanted = batch.sample_ids.numpy(), expected.sample_ids.numpy()
        gone = (wanted >= 100) & (wanted < 200)
        assert batch.lost == gone.sum() and batch.state == expected.state and batch.weights.all()
        assert not ((ids >= 100) & (ids < 200)).any()
        for name in ("sample_ids", "codes", "cond", "epochs", "latents"):
            ours, theirs = getattr(batch, name), getattr(expected, name)
            assert ours is None or np.array_equal(ours[~gone], theirs[~gone]), name
        # conftest.py: draw d of sample n is n + 10 d, its class n mod 7, its caption its number, its latents n
        drawn = (batch.codes[:, 0, 0, 0].numpy() - ids) % 50
        assert np.isin(drawn, [10, 20] if changes["targets"] == "draws" else [0]).all()
        condition = {"class": ids % 7, "none": 0 * ids}.get(changes.get("condition", "text"), ids)
        assert np.array_equal(batch.cond[:, 0], condition)
        assert batch.latents is None or np.array_equal(batch.latents[:, 0, 0, 0], ids)


def test_a_loss_is_told_with_the_first_batch_that_misses_something(make_codes: MakeCodes) -> None:
    codes = remove(make_codes([[60, 40], [70, 30], [200]]), "000001.tar")
    found = batches(codes, 20)
    (line,) = next(batch.news for batch in found if batch.lost)
    assert "missing code shard" in line and sum(len(batch.news) for batch in found) == 1


def test_what_is_known_to_be_lost_is_not_read(make_codes: MakeCodes) -> None:
    codes = make_codes([[60, 40], [70, 30], [200]])
    data, lost = Mixture([codes, make_codes([[50]], name="more")]), LostBlocks(6, RETRY)
    lost.add(data.blocks_in({codes.folder / "000001.tar"}))
    assert np.flatnonzero(lost.mask).tolist() == [2, 3] and len(data.blocks_in({})) == 0
    found = batches(data, 20, lost=lost)
    ids = np.concatenate([batch.sample_ids for batch in found])
    assert not ((ids >= 100) & (ids < 200)).any() and sum(batch.lost for batch in found) > 0
    assert not any(batch.news for batch in found)


def test_a_rotten_row_costs_its_block_alone(make_codes: MakeCodes) -> None:
    codes = make_codes([[60, 40], [70, 30], [200]])
    path = codes.folder / "000001.tar"
    offset, size = codes.manifest.shards[1].blocks[1].members["draw1.npy"]
    data = bytearray(path.read_bytes())
    data[offset + size - 1] ^= 1
    path.write_bytes(data)
    found = batches(CodeShards.open(codes.folder), 20)
    ids = np.concatenate([batch.sample_ids for batch in found])
    assert not np.isin(np.arange(100, 170), ids, invert=True).any()
    assert sum(batch.lost for batch in found) > 0 and sum(len(batch.news) for batch in found) == 1


def test_a_lost_block_of_a_mixture_is_that_of_its_folder(make_codes: MakeCodes) -> None:
    first, second = make_codes([[60, 40], [100]]), make_codes([[80], [20]], name="more")
    found = batches(Mixture([first, remove(second, "000000.tar")]), 20, targets="soft")
    ids = np.unique(np.concatenate([batch.sample_ids for batch in found]))
    assert np.array_equal(ids, np.delete(np.arange(300), np.arange(200, 280)))


def test_where_nothing_can_be_read_the_rank_ends(make_codes: MakeCodes) -> None:
    codes = remove(remove(make_codes([[60], [40]]), "000000.tar"), "000001.tar")
    with pytest.raises(StorageError, match=r"none of 32 samples drawn in place .*codes\. Check the storage"):
        batches(codes, 1)


@pytest.mark.parametrize("targets", ["draws", "soft"])
def test_in_validation_the_samples_of_a_lost_shard_weigh_nothing(
    make_codes: MakeCodes, clock: Clock, targets: str
) -> None:
    codes = remove(make_codes([[60, 40], [70, 30], [205]]), "000001.tar")
    lost, start = LostBlocks(5, RETRY), clock.now
    for told in (1, 0):
        found = list(validation_batches(Mixture([codes]), condition="text", targets=targets, lost=lost, **OPTIONS))
        weights = np.concatenate([batch.weights for batch in found])
        assert np.flatnonzero(weights).tolist() == [*range(100), *range(200, 405)]
        assert sum(batch.lost for batch in found) == 100 and sum(len(batch.news) for batch in found) == told
    assert clock.now == start + RETRY  # in the first pass alone
