"""Many short byte strings in two arrays. A list of them takes several times the memory, and forked workers copy it."""

import hashlib
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt


class PackedBytes:
    """A read-only sequence of byte strings: 8 bytes for each beside its own."""

    def __init__(self, data: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        """data: all strings, one after another; ends: where each ends in `data`."""
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, strings: Sequence[bytes]) -> "PackedBytes":
        """Pack strings."""
        data = np.frombuffer(b"".join(strings), np.uint8)
        return cls(data, np.fromiter(accumulate(map(len, strings)), np.int64, len(strings)))

    def fingerprint(self) -> str:
        """sha256 of the strings and where each ends."""
        return hashlib.sha256(self.data.tobytes() + self.ends.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        assert 0 <= index < len(self), "counted from the first"
        return self.data[self.ends[index - 1] if index else 0 : self.ends[index]].tobytes()
