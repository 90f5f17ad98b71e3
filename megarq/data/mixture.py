"""Several folders of code shards, read as one by weight; a single folder is a mixture of one.

    --data codes/cc3m codes/cc12m:2 codes/yfcc:0.5       # each picture once, twice, and every second one in an epoch

Worked example: folders of N = 1000 and 400 samples with weights 1 and 0.5, so n = 1000 and 200 samples of E = 1200.

1. The E slots of an epoch are dealt evenly: slot p is folder 0's where floor((p+1) n_0 / E) > floor(p n_0 / E), as its
   sample floor(p n_0 / E); what is left goes on to the next folder by the same rule. This is exact, even at any length,
   and needs no table.
2. Every folder has an endless stream of its own (order.py). Its sample j of epoch e is number e n + j of that stream:
   a folder of weight 0.5 takes two epochs to a pass, and one of weight 2 makes two in an epoch. Draws and captions take
   turns with the folder's passes.
3. A folder has lanes in proportion to its share of a batch, about 1,024 in all. Blocks, samples and lanes are numbered
   through all folders, in the order in which they are given.
"""

import math
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megarq.data.code_shards import CodeShards, ShardError
from megarq.data.order import MAX_LANES, WINDOW, IntArray, Picks, SampleOrder
from megarq.errors import ConfigError, DataError


@dataclass(frozen=True)
class Source:
    """A folder of code shards as it is named on a command line."""

    folder: Path
    """Where it is."""
    weight: float = 1.0
    """Passes over it in an epoch."""
    exclusions: tuple[Path, ...] = ()
    """Lists of the samples to leave out."""


def parse_sources(data: Sequence[str], exclude_keys: Sequence[str] = ()) -> list[Source]:
    """`FOLDER[:WEIGHT]` of each folder, and `[FOLDER=]FILE` of each list; a list without folder is for all of them.

    Raises: ConfigError for a weight that is not positive, a folder named twice, or a list for another folder.
    """
    weights: dict[str, float] = {}
    for text in data:
        folder, weight = _folder_and_weight(text)
        if folder in weights:
            raise ConfigError(f"--data names {folder} twice. Give it once, with a weight: {folder}:2.")
        weights[folder] = weight
    lists: dict[str, list[Path]] = {folder: [] for folder in weights}
    for text in exclude_keys:
        folder, separator, file = text.partition("=")
        if not separator or Path(text).exists():
            for files in lists.values():
                files.append(Path(text))
        elif folder in lists:
            lists[folder].append(Path(file))
        else:
            raise ConfigError(
                f"--exclude-keys {text}: {folder} is no folder of --data. Give one of {', '.join(lists)}, or a file."
            )
    return [Source(Path(folder), weight, tuple(lists[folder])) for folder, weight in weights.items()]


def _folder_and_weight(text: str) -> tuple[str, float]:
    folder, separator, number = text.rpartition(":")
    if not separator or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not (weight > 0 and math.isfinite(weight)):
        raise ConfigError(f"--data {text}: the weight {number} is not positive. Give passes in an epoch, such as :0.5.")
    return folder, weight


def deal(slots: IntArray, counts: Sequence[int]) -> tuple[IntArray, IntArray]:
    """Slots [n] of an epoch of sum(counts) -> (folder of each [n], its index among the folder's [n])."""
    folder, index = np.zeros_like(slots), slots.copy()
    left = sum(counts)
    for number, count in enumerate(counts[:-1]):
        here = folder == number
        place = index[here]
        before = place * count // left
        taken = (place + 1) * count // left > before
        folder[here] = np.where(taken, number, number + 1)
        index[here] = np.where(taken, before, place - before)
        left -= count
    return folder, index


class Mixture:
    """The samples of one or more folders. Blocks [0, blocks) and samples are counted through all of them."""

    def __init__(self, folders: Sequence[CodeShards], weights: Sequence[float] | None = None) -> None:
        """Raises: DataError where the folders hold codes of different shapes, codebooks or RQ-VAEs, or no samples."""
        self.folders = tuple(folders)
        self.weights = tuple(weights or [1.0] * len(folders))
        self.settings = folders[0].settings
        for folder in folders[1:]:
            folder.check_model(self.settings.code_shape, self.settings.codebook_sizes, self.settings.fingerprint)
        self.counts = [_epoch_share(*part) for part in zip(self.folders, self.weights, strict=True)]
        """Samples of each folder in an epoch."""
        self.block_sizes = np.concatenate([folder.block_sizes for folder in folders])
        """[blocks] samples of each block."""
        self._ends = np.cumsum([len(folder.block_sizes) for folder in folders])
        self._starts = self._ends - np.diff(self._ends, prepend=0)
        self._folder_of_block: IntArray = np.repeat(np.arange(len(folders)), np.diff(self._ends, prepend=0))
        blocks = np.cumsum([0, *(folder.all_blocks for folder in folders)])
        self.block_numbers = np.concatenate(
            [folder.block_numbers + first for folder, first in zip(folders, blocks[:-1], strict=True)]
        )
        """[blocks] number of each block, those that a view leaves out counted: it stays when shards are held out."""
        self._first_sample = np.cumsum([0, *(folder.manifest.samples for folder in folders)])
        self.draws = np.array([folder.settings.draws for folder in folders])[self._folder_of_block]
        """[blocks] drawn stacks of each block."""

    @property
    def samples(self) -> int:
        """Samples in all folders, each counted once."""
        return int(self.block_sizes.sum())

    def order(self, seed: int) -> "MixedOrder":
        """The endless stream of samples, mixed by weight."""
        return MixedOrder([folder.block_sizes for folder in self.folders], self.counts, seed)

    def read_run(self, block: int, first: int, draw: int, out: npt.NDArray[np.uint16]) -> None:
        """Fill out [n, H, W, D] with the code stacks of rows first .. first + n - 1 of a block, in one read."""
        folder, number = self._place(block)
        with self._counted_through(folder):
            self.folders[folder].read_run(number, first, draw, out)

    def text_run(self, section: str, block: int, first: int, count: int) -> list[Any]:
        """What a section ("keys", "captions" or "labels") says of rows first .. first + count - 1, in one read."""
        folder, number = self._place(block)
        with self._counted_through(folder):
            return self.folders[folder].text_run(section, number, first, count)

    def _place(self, block: int) -> tuple[int, int]:
        """The number of the folder that holds a block, and the block's number in it."""
        folder = int(self._folder_of_block[block])
        return folder, block - int(self._starts[folder])

    @contextmanager
    def _counted_through(self, folder: int) -> Iterator[None]:
        """Blocks that a folder says are out of reach are counted through all folders."""
        try:
            yield
        except ShardError as error:
            error.blocks = error.blocks + self._starts[folder]
            raise

    def sample_ids(self, block: IntArray, row: IntArray) -> IntArray:
        """[n], [n] -> numbers [n] of the samples."""
        ids = np.empty_like(block)
        for folder, number, here in self._by_folder(block):
            ids[here] = folder.sample_ids(block[here] - self._starts[number], row[here]) + self._first_sample[number]
        return ids

    def files(self, blocks: IntArray | None = None) -> dict[Path, int]:
        """The shards that these blocks lie in, all by default, with the bytes that each must have."""
        if blocks is None:
            blocks = np.arange(len(self.block_sizes))
        found: dict[Path, int] = {}
        for folder, number, here in self._by_folder(blocks):
            found |= folder.files(blocks[here] - self._starts[number])
        return found

    def blocks_in(self, files: Collection[Path]) -> IntArray:
        """Numbers of the blocks that lie in these shards."""
        blocks = range(len(self.block_sizes)) if files else ()
        places = ((number, *self._place(number)) for number in blocks)
        inside = [number for number, folder, block in places if self.folders[folder].path_of(block) in files]
        return np.array(inside, np.int64)

    def read_latents(self, block: IntArray, row: IntArray) -> npt.NDArray[np.float16]:
        """[n], [n] -> latents [n, H, W, C]. Raises: DataError where none are stored."""
        latents = np.empty((len(block), *(self.settings.latent_shape or ())), "<f2")
        for folder, number, here in self._by_folder(block):
            with self._counted_through(number):
                latents[here] = folder.read_latents(block[here] - self._starts[number], row[here])
        return latents

    def describe(self) -> list[dict[str, float | int]]:
        """What the order follows from: of each folder its samples, its weight and a checksum of its blocks' sizes."""
        return [
            {"samples": folder.samples, "weight": weight, "blocks_crc32": zlib.crc32(folder.block_sizes.tobytes())}
            for folder, weight in zip(self.folders, self.weights, strict=True)
        ]

    def _by_folder(self, block: IntArray) -> list[tuple[CodeShards, int, IntArray]]:
        """(folder, its number, places of its blocks among these) of each folder that has some."""
        numbers = self._folder_of_block[block]
        return [(self.folders[number], number, np.flatnonzero(numbers == number)) for number in np.unique(numbers)]


def _epoch_share(folder: CodeShards, weight: float) -> int:
    count = round(weight * folder.samples)
    if count == 0:
        raise DataError(
            f"--data {folder.folder}:{weight:g} takes none of its {folder.samples} samples. Give a larger weight, or "
            "leave the folder out."
        )
    return count


class MixedOrder:
    """The endless stream of samples of several folders, as SampleOrder is of one."""

    def __init__(
        self,
        block_sizes: Sequence[IntArray],
        counts: Sequence[int],
        seed: int,
        window: int = WINDOW,
        max_lanes: int = MAX_LANES,
    ) -> None:
        """block_sizes: [blocks] of each folder; counts: samples of each folder in an epoch."""
        self.samples = sum(counts)
        """Samples in an epoch."""
        self._counts = list(counts)
        self._orders = [
            SampleOrder(sizes, seed, window, max(1, round(max_lanes * count / self.samples)))
            for sizes, count in zip(block_sizes, counts, strict=True)
        ]
        self._first_lanes = np.cumsum([0, *(order.lanes for order in self._orders)])
        self._first_blocks = np.cumsum([0, *(len(sizes) for sizes in block_sizes)])
        self.lanes = int(self._first_lanes[-1])
        """Lanes of all folders."""
        self.window = max(order.window for order in self._orders)
        """The longest window of any lane."""

    def picks(self, start: int, count: int) -> Picks:
        """Samples start .. start + count - 1 of the endless stream; costs O(count), wherever `start` is."""
        epoch, slot = np.divmod(np.arange(start, start + count), self.samples)
        folder, index = deal(slot, self._counts)
        parts, places = [], []
        for number in np.unique(folder).tolist():
            here = np.flatnonzero(folder == number)
            first = int(epoch[here[0]]) * self._counts[number] + int(index[here[0]])
            picks = self._orders[number].picks(first, len(here))
            lane, block = picks.lane + self._first_lanes[number], picks.block + self._first_blocks[number]
            parts.append(replace(picks, lane=lane, block=block))
            places.append(here)
        if len(parts) == 1:
            return parts[0]
        return Picks.joined(parts).at(np.argsort(np.concatenate(places)))

    def blocks(self, epoch: int, lanes: IntArray) -> IntArray:
        """Numbers of the blocks that these lanes are made of, in the pass over each folder that an epoch begins in."""
        parts = []
        for order, count, lane, block in zip(
            self._orders, self._counts, self._first_lanes, self._first_blocks, strict=False
        ):
            own = lanes[(lanes >= lane) & (lanes < lane + order.lanes)] - lane
            parts.append(order.blocks(epoch * count // order.samples, own) + block)
        return np.concatenate(parts)

    def runs(self, epoch: int, lane: int, window: int) -> list[tuple[int, int, int]]:
        """(block, first row, rows) of each run of rows that a lane's window is made of, in the order of its places."""
        number = int(np.searchsorted(self._first_lanes, lane, side="right")) - 1
        runs = self._orders[number].runs(epoch, lane - int(self._first_lanes[number]), window)
        first = int(self._first_blocks[number])
        return [(block + first, row, rows) for block, row, rows in runs]
