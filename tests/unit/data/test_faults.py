"""Counting and judging faults."""

import logging

import pytest

from megarq.data.faults import Fault, Faults, TooManyFaultsError
from megarq.errors import DataError


def skip(faults: Faults, times: int = 1) -> None:
    for _ in range(times):
        faults.skip("a.tar", "k", Fault.NO_IMAGE, "only text")


def test_too_many_skipped_samples_stop_the_run() -> None:
    faults = Faults(0.01)
    faults.count_seen(2000)
    skip(faults, 20)
    with pytest.raises(
        TooManyFaultsError, match=r"21 bad samples of 2000 seen.* rate of 0\.01 \(21 no image; .*k in a\.tar"
    ):
        skip(faults)


def test_early_skips_are_judged_over_a_thousand() -> None:
    faults = Faults(0.01)
    faults.count_seen(10)
    skip(faults, 10)
    with pytest.raises(DataError, match="10 bad samples of 10 seen"):
        faults.finish()


def test_notes_are_logged_and_counted_but_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults(0.0)
    faults.note("a.tar", "k", Fault.NO_CAPTION, "used without")
    faults.note("b.tar", "", Fault.EMPTY, "it holds no samples")
    faults.finish()
    assert faults.counts == {"no caption": 1, "empty shard": 1} and faults.skipped == 0
    assert caplog.messages == ["k in a.tar: no caption: used without", "b.tar: empty shard: it holds no samples"]
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_rate_zero_accepts_no_skip() -> None:
    with pytest.raises(DataError, match="1 bad samples"):
        skip(Faults(0.0))


def test_a_rate_outside_its_range_is_refused() -> None:
    with pytest.raises(DataError, match="--max-bad-rate=1"):
        Faults(1.0)
