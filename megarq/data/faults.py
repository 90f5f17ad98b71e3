"""What may be wrong with a sample or a shard: logged by name, counted by kind, an error only when it is too much."""

import logging
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from typing import Literal

from megarq.errors import DataError

logger = logging.getLogger(__name__)


OPTION: Literal["--max-bad-rate"] = "--max-bad-rate"


class Fault(StrEnum):
    """Kinds of faults, by the name they have in logs and manifests."""

    UNREADABLE_IMAGE = "unreadable image"
    WRONG_SIZE = "wrong size"
    NO_IMAGE = "no image"
    UNREADABLE_TEXT = "unreadable text"
    DUPLICATE_KEY = "duplicate key"
    TRUNCATED = "truncated shard"
    EMPTY = "empty shard"
    NO_CAPTION = "no caption"
    MISSING_FILE = "missing file"
    NOT_FINITE = "not finite"


class TooManyFaultsError(DataError):
    """More samples were skipped than are accepted."""


class Faults:
    """Counts faults. Those that cost a sample are judged: above the accepted rate, the run stops."""

    def __init__(
        self,
        max_rate: float = 0.01,
        grace: int = 1000,
        setting: Literal["--max-bad-rate", "data.max_bad_rate"] = OPTION,
    ) -> None:
        """max_rate: largest share of samples skipped; while fewer than `grace` are seen, `skip` takes it of `grace`.

        setting: what the user changes to accept more. Raises: DataError for a rate outside 0 <= max_rate < 1.
        """
        if not 0 <= max_rate < 1:
            raise DataError(f"{setting}={max_rate}: use a share from 0 up to, but not including, 1.")
        self.max_rate = max_rate
        self.grace = grace
        self._setting = setting
        self.seen = 0
        """Samples seen, used and skipped."""
        self.skipped = 0
        """Samples not used."""
        self.counts: Counter[str] = Counter()
        """Faults by kind, of samples used and skipped."""
        self._last = ""

    def count_seen(self, n: int = 1) -> None:
        """Count n samples as seen, whether they are used or skipped."""
        self.seen += n

    def count_finished(self, shard: str, used: int, skipped: int, counts: Mapping[str, int]) -> None:
        """Count the samples of a shard that was finished before, whose faults stand in an earlier log."""
        self.seen += used + skipped
        self.skipped += skipped
        self.counts.update(counts)
        if skipped:
            self._last = f"in {shard}"

    def count_unlisted(self, source: str, count: int) -> None:
        """Count the pictures of a source that cannot even be listed."""
        if count:
            self.count_finished(source, 0, count, {Fault.UNREADABLE_IMAGE: count})

    def skip(self, shard: str, key: str, kind: Fault, reason: str) -> None:
        """Log and count a sample that is not used. Raises: TooManyFaultsError."""
        self.skipped += 1
        self.counts[kind] += 1
        self._last = f"{key} in {shard}: {kind}: {reason}"
        logger.warning("skipped %s", self._last)
        self._judge(max(self.seen, self.grace))

    def note(self, shard: str, key: str, kind: Fault, reason: str) -> None:
        """Log and count a fault that costs no sample; the key is empty where it is the whole shard's."""
        self.counts[kind] += 1
        logger.warning("%s: %s: %s", f"{key} in {shard}" if key else shard, kind, reason)

    def finish(self) -> None:
        """Judge the whole, however small. Raises: TooManyFaultsError."""
        self._judge(self.seen)

    def _judge(self, seen: int) -> None:
        if self.skipped > self.max_rate * seen:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common())
            raise TooManyFaultsError(
                f"{self.skipped} bad samples of {self.seen} seen, above the accepted rate of {self.max_rate} ({kinds}; "
                f"all named in the log, the last: {self._last}). Copy or make them again, remove them, or accept more "
                f"by {self._setting}."
            )
