"""Which samples form which global batch: a function of (seed, epoch, batch size) alone, without any I/O.

Worked example: blocks of 1024, 1024 and 500 samples (N = 2548), seed 0, window 256.

1. In epoch e the blocks are permuted by (seed, e), say to 2, 0, 1; their samples in that order are elements 0 .. 2547.
2. The elements are cut into `lanes` equal spans: lanes = min(1024, N // window) = 9, of 284 or 283 elements each,
   the longer ones first. So a lane is a run of whole blocks (but for its ends) and is read almost sequentially.
3. Inside a lane each run of 256 elements (a window) is permuted by (seed, e, lane, window).
4. Sample s of the epoch is element s // 9 of lane s % 9: a batch takes the next samples of all lanes.
5. Epochs follow each other without a seam: global batch b of size B is samples b*B .. b*B + B - 1 of the endless
   stream, and the tail of an epoch opens the next epoch's first batch.

A rank serves the lanes `lane % ranks == rank`, and so reads about 1/ranks of the bytes, window after window (`runs`).
Where a batch gives it more or fewer than B / ranks samples, the surplus goes to the ranks that are short: `rank_share`.

All random numbers are splitmix64 hashes, not a generator's stream: they stay the same in every version of numpy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from megarq.errors import DataError

UInt64Array = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.int64]

WINDOW = 256
MAX_LANES = 1024


@dataclass(frozen=True)
class LoaderState:
    """Where a loader stands: the next sample to be served is number `sample` of epoch `epoch`."""

    epoch: int = 0
    """Passes over the data that are complete."""
    sample: int = 0
    """Samples of this epoch that have been served."""

    def position(self, samples_per_epoch: int) -> int:
        """Number of the next sample in the endless stream of epochs. Raises: DataError for a state of other data."""
        if self.epoch < 0 or not 0 <= self.sample < samples_per_epoch:
            raise DataError(
                f"loader state epoch={self.epoch} sample={self.sample} with {samples_per_epoch} samples per epoch: "
                "the run was saved on other data. Resume on the data it was started on."
            )
        return self.epoch * samples_per_epoch + self.sample

    @staticmethod
    def at(position: int, samples_per_epoch: int) -> "LoaderState":
        """The state before sample `position` of the endless stream."""
        return LoaderState(*divmod(position, samples_per_epoch))


def mix(values: UInt64Array) -> UInt64Array:
    """The finalizer of splitmix64 (Steele et al., 2014), element by element: a bijection of 64-bit integers."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_array(values: npt.ArrayLike, *key: int) -> UInt64Array:
    """A uint64 hash of every value [...] (at least 1-d), under a key of integers (seed, epoch, ...)."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = mix(state ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    return mix(mix(np.atleast_1d(values).astype(np.uint64)) ^ state)


def sample_hash(seed: int, sample_ids: npt.ArrayLike) -> UInt64Array:
    """The number from which a sample's caption is chosen: a hash of (seed, sample)."""
    return hash_array(sample_ids, seed)


def permutation(count: int, *key: int) -> IntArray:
    """A permutation of range(count) that the key decides."""
    return np.argsort(hash_array(np.arange(count), *key), kind="stable")


@dataclass(frozen=True)
class Picks:
    """Consecutive samples of the endless stream; every field has shape [n]."""

    epoch: IntArray
    """Epoch of each sample."""
    lane: IntArray
    """Lane that each sample was taken from."""
    window: IntArray
    """Number of the window that each sample's lane stands in."""
    place: IntArray
    """Place of each sample among the elements of its window, before they are shuffled."""
    block: IntArray
    """Index of each sample's block."""
    row: IntArray
    """Row of each sample in its block."""

    def at(self, which: npt.NDArray[np.generic]) -> "Picks":
        """Those at these places, or where this is true."""
        return Picks(*(getattr(self, field.name)[which] for field in fields(self)))

    @staticmethod
    def joined(parts: "Sequence[Picks]") -> "Picks":
        """One after the other."""
        if len(parts) == 1:
            return parts[0]
        return Picks(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Picks)))


class SampleOrder:
    """The endless stream of samples of a data set made of blocks."""

    def __init__(self, block_sizes: npt.ArrayLike, seed: int, window: int = WINDOW, max_lanes: int = MAX_LANES) -> None:
        """block_sizes [blocks]: samples of each block. Raises: DataError where there are no samples."""
        self._sizes = np.asarray(block_sizes, dtype=np.int64)
        self.samples = int(self._sizes.sum())
        """Samples in an epoch."""
        if self.samples == 0:
            raise DataError("the data set has no samples. Check that its shards were made from readable images.")
        self.lanes = min(max_lanes, max(1, self.samples // window))
        """Spans that an epoch is dealt into."""
        self._seed = seed
        self.window = min(window, -(-self.samples // self.lanes))
        """Elements of a window; where a lane is shorter, of the longest lane."""
        self._blocks_of_epoch: tuple[int, IntArray, IntArray] | None = None
        self._window_of_lanes: tuple[int, int, IntArray] | None = None

    def picks(self, start: int, count: int) -> Picks:
        """Samples start .. start + count - 1 of the endless stream; costs O(count), wherever `start` is."""
        parts = []
        while count > 0:
            epoch, first = divmod(start, self.samples)
            taken = min(count, self.samples - first)
            parts.append(self._picks_of_epoch(epoch, first, taken))
            start, count = start + taken, count - taken
        return Picks.joined(parts)

    def runs(self, epoch: int, lane: int, window: int) -> list[tuple[int, int, int]]:
        """(block, first row, rows) of each run of rows that a lane's window is made of, in the order of its places."""
        start, stop = (self._lane_start(lane + after) for after in (0, 1))
        start += window * self.window
        stop = min(stop, start + self.window)
        order, ends = self._permuted_blocks(epoch)
        at, runs = int(np.searchsorted(ends, start, side="right")), []
        while start < stop:
            block = int(order[at])
            rows = min(int(ends[at]), stop) - start
            if rows:
                runs.append((block, start - int(ends[at] - self._sizes[block]), rows))
            start, at = start + rows, at + 1
        return runs

    def blocks(self, epoch: int, lanes: IntArray) -> IntArray:
        """Numbers of the blocks that these lanes are made of in an epoch, ascending."""
        order, ends = self._permuted_blocks(epoch)
        first = np.searchsorted(ends, self._lane_start(lanes), side="right")
        last = np.searchsorted(ends, self._lane_start(lanes + 1) - 1, side="right")
        spans = [order[start : stop + 1] for start, stop in zip(first, last, strict=True)]
        found = np.unique(np.concatenate([np.empty(0, np.int64), *spans]))
        return found[self._sizes[found] > 0]

    def _picks_of_epoch(self, epoch: int, first: int, count: int) -> Picks:
        index, lane = np.divmod(np.arange(first, first + count), self.lanes)
        window, place = np.divmod(index, self.window)
        for number in range(int(window[0]), int(window[-1]) + 1):
            here = window == number
            place[here] = self._window_permutations(epoch, number)[lane[here], place[here]]
        element = self._lane_start(lane) + window * self.window + place
        order, ends = self._permuted_blocks(epoch)
        at = np.searchsorted(ends, element, side="right")
        block = order[at]
        row = element - (ends[at] - self._sizes[block])
        return Picks(np.full(count, epoch), lane, window, place, block, row)

    def _lane_start(self, lane: Any) -> Any:
        """First element of a lane, or of each of many; that of the lane behind the last is the end."""
        short, longer = divmod(self.samples, self.lanes)
        return lane * short + np.minimum(lane, longer)

    def _permuted_blocks(self, epoch: int) -> tuple[IntArray, IntArray]:
        """Blocks in the epoch's order, and the element that each ends before."""
        if self._blocks_of_epoch is None or self._blocks_of_epoch[0] != epoch:
            order = permutation(len(self._sizes), self._seed, epoch)
            self._blocks_of_epoch = (epoch, order, np.cumsum(self._sizes[order]))
        return self._blocks_of_epoch[1:]

    def _window_permutations(self, epoch: int, number: int) -> IntArray:
        """Permutations of window `number` of every lane: [lanes, <= window], valid up to each lane's own length."""
        if self._window_of_lanes is None or self._window_of_lanes[:2] != (epoch, number):
            short, longer = divmod(self.samples, self.lanes)
            lengths = short + (np.arange(self.lanes) < longer) - number * self.window
            width = int(min(self.window, lengths.max()))
            places = np.arange(self.lanes)[:, None] * self.window + np.arange(width)
            keys = hash_array(places, self._seed, epoch, number)
            keys[np.arange(width) >= lengths[:, None]] = np.iinfo(np.uint64).max
            self._window_of_lanes = (epoch, number, np.argsort(keys, axis=1, kind="stable"))
        return self._window_of_lanes[2]


def rank_share(lane: IntArray, world_size: int, rank: int) -> IntArray:
    """Which samples of a global batch a rank serves: exactly B / world_size ascending places in it.

    lane [B]: lane of each sample. A sample belongs to rank lane % world_size; what a rank has beyond its share goes, in
    order, to the ranks that are short of samples.
    """
    share, rest = divmod(len(lane), world_size)
    assert rest == 0, "the loader checks that the ranks divide the batch"
    owner = lane % world_size
    by_owner = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=world_size)
    within = np.arange(len(lane)) - np.repeat(np.cumsum(counts) - counts, counts)
    surplus = np.sort(by_owner[within >= share])
    owner[surplus] = np.repeat(np.arange(world_size), np.maximum(share - counts, 0))
    return np.flatnonzero(owner == rank)
