"""The samples of some shards of a code folder by one running number, for looking at single ones."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megarq.data.code_shards import CodeShards
from megarq.data.manifest import Manifest


class Samples:
    """Sample 0 is the first of the first shard given."""

    def __init__(self, folder: Path, manifest: Manifest, shards: Sequence[int]) -> None:
        """shards: numbers in the manifest, of shards that are there and whole."""
        self._codes = CodeShards(folder, manifest, shards)
        self.records = [manifest.shards[number] for number in shards]
        """The shards."""
        self._shard_ends = np.cumsum([record.samples for record in self.records])
        self._block_ends = np.cumsum(self._codes.block_sizes)
        self.settings = manifest.settings
        """What the shards share."""

    def __len__(self) -> int:
        return int(self._block_ends[-1]) if len(self._block_ends) else 0

    def shard(self, sample: int) -> int:
        """The place of the shard of a sample in `records`."""
        return int(np.searchsorted(self._shard_ends, sample, "right"))

    def of_shard(self, place: int) -> range:
        """The samples of a shard."""
        end = int(self._shard_ends[place])
        return range(end - self.records[place].samples, end)

    def name(self, sample: int) -> str:
        """`000017.tar/KEY`, as exclusion lists have it."""
        return f"{self.records[self.shard(sample)].file}/{self.key(sample)}"

    def key(self, sample: int) -> str:
        """Its key."""
        return self._codes.key(*self._place(sample))

    def captions(self, sample: int) -> list[str]:
        """Its captions."""
        return self._codes.captions(*self._place(sample))

    def codes(self, samples: Sequence[int]) -> npt.NDArray[np.uint16]:
        """Argmin stacks [n, H, W, D]."""
        places = np.array([self._place(sample) for sample in samples], np.int64).reshape(-1, 2)
        return self._codes.read_codes(places[:, 0], places[:, 1])

    def _place(self, sample: int) -> tuple[int, int]:
        """(block, row)."""
        block = int(np.searchsorted(self._block_ends, sample, "right"))
        return block, int(sample - self._block_ends[block] + self._codes.block_sizes[block])
