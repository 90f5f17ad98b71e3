"""The order contract: which samples form which batch."""

import numpy as np
import pytest

from megarq.data.order import LoaderState, SampleOrder, mix, permutation, rank_share, sample_hash
from megarq.errors import DataError

LAYOUTS = [[1], [5, 3], [1024, 1024, 500], [100] * 37, [0, 300, 0, 700]]
PUBLISHED = [553, 110, 533, 208, 534, 187, 449, 48]


def ids(order: SampleOrder, sizes: list[int], start: int, count: int) -> np.ndarray:
    picks = order.picks(start, count)
    return (np.cumsum(sizes) - sizes)[picks.block] + picks.row


@pytest.mark.parametrize("sizes", LAYOUTS)
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_has_every_sample_once(sizes: list[int], epoch: int) -> None:
    order = SampleOrder(sizes, seed=1)
    total = sum(sizes)
    assert np.array_equal(np.sort(ids(order, sizes, epoch * total, total)), np.arange(total))


@pytest.mark.parametrize("window", [256, 10])
def test_windows_that_do_not_divide_the_lanes_lose_nothing(window: int) -> None:
    sizes = [333, 10, 901]
    order = SampleOrder(sizes, seed=1, window=window, max_lanes=7)
    assert np.array_equal(np.sort(ids(order, sizes, 0, 1244)), np.arange(1244))


def test_rows_lie_inside_their_blocks() -> None:
    sizes = np.array([100] * 37)
    picks = SampleOrder(sizes, seed=2).picks(0, 3700)
    assert (picks.row >= 0).all() and (picks.row < sizes[picks.block]).all()


def test_the_stream_does_not_depend_on_how_it_is_cut() -> None:
    sizes = [1024, 1024, 500]
    whole = ids(SampleOrder(sizes, seed=4), sizes, 0, 3 * 2548)
    order, cuts = SampleOrder(sizes, seed=4), np.random.default_rng(0)
    for start in cuts.integers(0, 2 * 2548, 20):
        count = int(cuts.integers(1, 2000))
        assert np.array_equal(ids(order, sizes, int(start), count), whole[start : start + count])


def test_epochs_are_told_apart_in_a_batch_that_crosses_the_seam() -> None:
    assert SampleOrder([10], seed=0).picks(8, 5).epoch.tolist() == [0, 0, 1, 1, 1]


def test_epochs_and_seeds_have_different_orders() -> None:
    sizes = [1024, 1024, 500]
    first = ids(SampleOrder(sizes, seed=0), sizes, 0, 2548)
    assert not np.array_equal(first, ids(SampleOrder(sizes, seed=0), sizes, 2548, 2548))
    assert not np.array_equal(first, ids(SampleOrder(sizes, seed=1), sizes, 0, 2548))


def test_large_sets_have_1024_lanes_and_small_ones_fewer() -> None:
    assert [SampleOrder([n], seed=0).lanes for n in (1, 255, 1797, 10**6)] == [1, 1, 7, 1024]


def test_consecutive_samples_come_from_consecutive_lanes() -> None:
    order = SampleOrder([5000], seed=0)
    assert order.picks(0, 5000).lane.tolist() == [s % order.lanes for s in range(5000)]


def test_a_lane_is_read_window_by_window() -> None:
    order = SampleOrder([4096], seed=0, max_lanes=4)
    picks = order.picks(0, 4096)
    first_window = picks.row[picks.lane == 1][:256]
    assert sorted(first_window) == list(range(1024, 1280)) and list(first_window) != sorted(first_window)


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_the_runs_of_a_window_are_its_rows_in_order(sizes: list[int]) -> None:
    order = SampleOrder(sizes, seed=3, window=100, max_lanes=5)
    picks = order.picks(order.samples, order.samples)
    for lane, window in np.unique(np.stack([picks.lane, picks.window]), axis=1).T.tolist():
        ours = picks.at((picks.lane == lane) & (picks.window == window))
        expected = [(block, first + i) for block, first, rows in order.runs(1, lane, window) for i in range(rows)]
        by_place = np.argsort(ours.place)
        assert ours.place[by_place].tolist() == list(range(len(expected)))
        assert list(zip(ours.block[by_place].tolist(), ours.row[by_place].tolist(), strict=True)) == expected


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_the_blocks_of_lanes_are_those_that_their_samples_lie_in(sizes: list[int]) -> None:
    order = SampleOrder(sizes, seed=3, window=100, max_lanes=5)
    picks = order.picks(2 * order.samples, order.samples)
    for rank in range(3):
        lanes = np.arange(rank, order.lanes, 3)
        expected = np.unique(picks.block[np.isin(picks.lane, lanes)])
        assert np.array_equal(order.blocks(2, lanes), expected)


def test_neighbours_of_a_small_set_are_scattered() -> None:
    sizes = [1024]
    stream = ids(SampleOrder(sizes, seed=0), sizes, 0, 1024)
    assert np.median(np.abs(np.diff(stream))) > 100


def test_neighbours_of_large_sets_share_a_shard_no_more_often_than_chance() -> None:
    shards, shard, block = 330, 10_000, 1024
    sizes = [min(block, shard - first) for first in range(0, shard, block)] * shards
    picks = SampleOrder(sizes, seed=0).picks(1_234_567, 50_000)
    of_shard = picks.block // (len(sizes) // shards)
    assert (of_shard[1:] == of_shard[:-1]).mean() < 1.5 / shards


def test_no_rank_of_64_reads_more_than_a_quarter_beyond_its_share_of_30_million_samples() -> None:
    sizes = ([1024] * 9 + [784]) * 3000
    order, ranks, steps, batch = SampleOrder(sizes, seed=0), 64, 256, 2048  # two windows of each lane
    rows = np.zeros(ranks)
    windows: list[set[tuple[int, int, int]]] = [set() for _ in range(ranks)]
    for step in range(steps):
        picks = order.picks(step * batch, batch)
        for rank in range(ranks):
            ours = picks.at(rank_share(picks.lane, ranks, rank))
            own = ours.lane % ranks == rank
            rows[rank] += (~own).sum()  # a sample of another's lane is read by itself
            windows[rank] |= set(zip(ours.epoch[own], ours.lane[own], ours.window[own], strict=True))
    for rank, held in enumerate(windows):
        rows[rank] += sum(length for window in held for _, _, length in order.runs(*map(int, window)))
    assert rows.max() < 1.25 * steps * batch / ranks


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_ranks_share_a_batch_equally_without_overlap(world_size: int, sizes: list[int]) -> None:
    lane = SampleOrder(sizes, seed=0).picks(17, 48).lane
    shares = [rank_share(lane, world_size, rank) for rank in range(world_size)]
    assert [len(share) for share in shares] == [48 // world_size] * world_size
    assert sorted(np.concatenate(shares)) == list(range(48))


def test_ranks_that_divide_the_lanes_read_their_own_alone() -> None:
    order = SampleOrder([1024] * 256, seed=0)
    lane = order.picks(2048 * 3, 2048).lane
    assert order.lanes == 1024
    assert all((lane[rank_share(lane, 8, rank)] % 8 == rank).all() for rank in range(8))


def test_ranks_that_do_not_divide_the_lanes_read_few_of_others() -> None:
    lane = SampleOrder([1024] * 256, seed=0).picks(1000, 1536).lane
    strangers = sum(int((lane[rank_share(lane, 3, rank)] % 3 != rank).sum()) for rank in range(3))
    assert strangers <= 3


def test_hashes_are_those_of_splitmix64() -> None:
    assert mix(np.array([0], np.uint64)).tolist() == [0xE220A8397B1DCDAF]


def test_the_order_is_the_published_one() -> None:
    order = SampleOrder([300, 300], seed=7)
    assert ids(order, [300, 300], 0, 8).tolist() == PUBLISHED


def test_permutations_and_sample_hashes_follow_their_key() -> None:
    assert sorted(permutation(50, 1, 2)) == list(range(50))
    assert not np.array_equal(permutation(50, 1, 2), permutation(50, 2, 1))
    assert sample_hash(0, [5]) != sample_hash(1, [5]) and sample_hash(0, [5]) != sample_hash(0, [6])


def test_a_data_set_without_samples_is_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        SampleOrder([0, 0], seed=0)


def test_a_state_of_other_data_is_refused() -> None:
    with pytest.raises(DataError, match="saved on other data"):
        LoaderState(0, 100).position(100)


def test_states_are_positions() -> None:
    assert LoaderState.at(250, 100) == LoaderState(2, 50) and LoaderState(2, 50).position(100) == 250
