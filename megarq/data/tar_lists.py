"""The samples of existing tars as ranges of bytes, for packing them anew in another order or size.

A sample is a run of members with one key, so its bytes are copied as they are: all captions, its class and whatever
else its .json says stay. Only headers are read to make the list, and it holds places, not pictures.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megarq.data.batches import batches_in_order
from megarq.data.faults import Fault, Faults
from megarq.data.image_shards import scan_samples
from megarq.errors import DataError


class _Scan(NamedTuple):
    """What one tar holds."""

    spans: npt.NDArray[np.int64]
    """[n, 2]: first byte of each sample, and the one after its last."""
    keys: npt.NDArray[np.bytes_]
    """[n] keys in UTF-8."""
    faults: Faults
    """What its reading skipped."""


class TarList:
    """All samples of local tars, each with a key of its own, to be packed by `image_writer`."""

    def __init__(self, shards: Sequence[str], faults: Faults, workers: int = 0) -> None:
        """Read the headers of all shards, in worker processes. A torn shard gives its whole samples; samples without an
        image, or of a key that came before, in whichever shard, are skipped.

        Raises: DataError for a shard that is missing, not local or no tar, no image at all, or too many faults.
        """
        self._shards = list(shards)
        scans = []
        scanned = batches_in_order(self._scan, min(workers, len(shards)), len(shards))
        for shard, scan in zip(
            shards, tqdm(scanned, total=len(shards), unit="shard", desc="indexing", delay=0.5), strict=True
        ):
            faults.count_finished(shard, len(scan.spans), scan.faults.skipped, scan.faults.counts)
            scans.append(scan)
        self._spans = np.concatenate([scan.spans for scan in scans])
        self._keys = np.concatenate([scan.keys for scan in scans])
        self._numbers = np.repeat(np.arange(len(scans), dtype=np.int32), [len(scan.spans) for scan in scans])
        self._drop_duplicates(faults)
        faults.finish()
        if not len(self):
            raise DataError(f"no images in {len(shards)} shards, the first being {shards[0]!r}. Check --shards.")

    def _scan(self, number: int) -> _Scan:
        faults, spans, keys = Faults(grace=2**62), [], []  # logged here, judged with all others
        for key, places in scan_samples(self._shards[number], faults, lambda tar, member: (member.offset, tar.offset)):
            spans.append((min(place[0] for place in places.values()), max(place[1] for place in places.values())))
            keys.append(key.encode())
        return _Scan(np.array(spans, np.int64).reshape(-1, 2), np.array(keys, np.bytes_), faults)

    def _drop_duplicates(self, faults: Faults) -> None:
        _, first = np.unique(self._keys, return_index=True)
        kept = np.zeros(len(self._keys), bool)
        kept[first] = True
        for index in np.flatnonzero(~kept).tolist():
            reason = "a sample of an earlier shard has it"
            faults.skip(self._shards[self._numbers[index]], self.key(index), Fault.DUPLICATE_KEY, reason)
        self._spans, self._keys, self._numbers = self._spans[kept], self._keys[kept], self._numbers[kept]

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        """Name of a sample in its shard."""
        return bytes(self._keys[index]).decode()

    def fingerprint(self) -> str:
        """sha256 of the shards' names and of the keys and places in them."""
        sha256 = hashlib.sha256("\n".join(Path(shard).name for shard in self._shards).encode())
        for array in (self._numbers, self._spans, self._keys):
            sha256.update(np.ascontiguousarray(array).data)
        return sha256.hexdigest()

    def packed(self, index: int) -> bytes:
        """A sample's bytes. Raises: OSError where its shard has gone or shrunk."""
        start, end = (int(place) for place in self._spans[index])
        with Path(self._shards[self._numbers[index]]).open("rb", buffering=0) as file:
            file.seek(start)
            data = file.read(end - start)
        if len(data) != end - start:
            raise OSError("its shard shrank while it was in use")
        return data
