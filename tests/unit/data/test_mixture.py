"""Folders mixed by weight: each gets its share of every epoch, evenly, under the order contract."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megarq.data.code_shards import CodeShards
from megarq.data.mixture import MixedOrder, Mixture, Source, deal, parse_sources
from megarq.data.order import SampleOrder
from megarq.errors import ConfigError, DataError

MakeCodes = Callable[..., CodeShards]


@pytest.mark.parametrize("counts", [[7], [5, 3], [1, 1000, 40], [100, 100, 1], [3, 0, 4]])
def test_every_folder_gets_each_of_its_samples_once(counts: list[int]) -> None:
    folder, index = deal(np.arange(sum(counts)), counts)
    assert [np.sort(index[folder == number]).tolist() for number in range(len(counts))] == [[*range(n)] for n in counts]


def test_folders_are_interleaved_evenly() -> None:
    counts = [500, 300, 200]
    folder, _ = deal(np.arange(1000), counts)
    for number, count in enumerate(counts):
        given = np.cumsum(folder == number)
        assert np.abs(given - np.arange(1, 1001) * count / 1000).max() <= 2


def test_the_samples_of_one_folder_come_in_the_order_of_its_own_stream() -> None:
    sizes, counts = [np.array([700, 300]), np.array([400])], [1000, 800]
    order = MixedOrder(sizes, counts, seed=3, window=50)
    picks = order.picks(900, 3 * 1800)
    alone = SampleOrder(sizes[1], 3, window=50, max_lanes=round(1024 * 800 / 1800))
    seen = picks.at(picks.block == 2)
    start = int((deal(np.arange(900), counts)[0] == 1).sum())
    expected = alone.picks(start, len(seen.row))
    assert np.array_equal(seen.row, expected.row) and np.array_equal(seen.epoch, expected.epoch)


def test_the_stream_does_not_depend_on_how_it_is_cut() -> None:
    order = MixedOrder([np.array([700, 300]), np.array([400])], [1000, 200], seed=0, window=50)
    whole, cuts = order.picks(0, 3600), np.random.default_rng(0)
    for start in cuts.integers(0, 2400, 20).tolist():
        part = order.picks(start, 1000)
        assert np.array_equal(part.block, whole.block[start : start + 1000])
        assert np.array_equal(part.row, whole.row[start : start + 1000])


def test_a_single_folder_is_in_the_order_of_sample_order() -> None:
    sizes = np.array([3000, 5000])
    mixed, alone = MixedOrder([sizes], [8000], seed=1).picks(5000, 6000), SampleOrder(sizes, 1).picks(5000, 6000)
    assert all(np.array_equal(getattr(mixed, name), getattr(alone, name)) for name in ("block", "row", "lane", "epoch"))


def test_the_blocks_of_lanes_are_those_of_each_folder_s_own_pass() -> None:
    sizes, counts = [np.array([300, 200, 500]), np.array([100] * 7)], [1000, 350]
    order = MixedOrder(sizes, counts, seed=3, window=50, max_lanes=12)
    lanes = np.arange(1, order.lanes, 2)
    seen = order.picks(2 * 1350, 2 * 1350).at(slice(None))  # epochs 2 and 3: the second folder's whole pass 1
    expected = np.unique(seen.block[np.isin(seen.lane, lanes) & (seen.epoch == np.where(seen.block < 3, 2, 1))])
    assert np.array_equal(order.blocks(2, lanes), expected)


def test_all_folders_share_about_1024_lanes() -> None:
    assert MixedOrder([np.array([10**6])] * 3, [10**6] * 3, seed=0).lanes in range(1020, 1028)


def test_weights_are_passes_in_an_epoch(make_codes: MakeCodes) -> None:
    mixture = Mixture([make_codes([[40]]), make_codes([[21]], name="b")], [2, 0.5])
    assert mixture.counts == [80, 10] and mixture.order(0).samples == 90


def test_blocks_and_samples_are_numbered_through_all_folders(make_codes: MakeCodes) -> None:
    first, second = make_codes([[4], [3]]).subset([1]), make_codes([[5, 6]], name="b")
    mixture = Mixture([first, second])
    assert mixture.block_numbers.tolist() == [1, 2, 3]
    assert mixture.sample_ids(np.array([0, 1, 2]), np.array([2, 0, 5])).tolist() == [6, 7, 17]


def test_folders_of_different_rqvaes_are_refused(make_codes: MakeCodes) -> None:
    with pytest.raises(DataError, match="the same numbers mean other pictures"):
        Mixture([make_codes([[4]]), make_codes([[4]], name="b", fingerprint="e" * 64)])


def test_a_weight_that_takes_nothing_is_refused(make_codes: MakeCodes) -> None:
    with pytest.raises(DataError, match=r"codes:0\.1 takes none of its 4 samples"):
        Mixture([make_codes([[4]])], [0.1])


def test_sources_are_folders_with_weights_and_lists(tmp_path: Path) -> None:
    listed = tmp_path / "a=b.txt"
    listed.touch()
    assert parse_sources(["codes/a", "codes/b:0.5"], ["x.txt", "codes/b=y.txt", str(listed)]) == [
        Source(Path("codes/a"), 1.0, (Path("x.txt"), listed)),
        Source(Path("codes/b"), 0.5, (Path("x.txt"), Path("y.txt"), listed)),
    ]
    assert parse_sources(["C:here"]) == [Source(Path("C:here"))]


@pytest.mark.parametrize(
    ("data", "lists", "message"),
    [
        (["a:0"], [], "the weight 0 is not positive"),
        (["a:inf"], [], "the weight inf is not positive"),
        (["a", "a:2"], [], "names a twice"),
        (["a"], ["b=x.txt"], "b is no folder of --data"),
    ],
)
def test_sources_that_make_no_sense_are_refused(data: list[str], lists: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_sources(data, lists)
