"""Arithmetic of measured collectives; the collectives themselves are tried in tests/distributed/test_preflight.py."""

import pytest

from megarq.parallel.measure import bus_bandwidth, typical


@pytest.mark.parametrize(("ranks", "factor"), [(2, 1.0), (4, 1.5), (8, 1.75)])
def test_bandwidth_is_that_of_a_rank_s_link(ranks, factor):
    assert bus_bandwidth(count=250_000_000, size=ranks, seconds=0.5) == pytest.approx(2 * factor)


def test_waiting_for_a_rank_that_comes_late_is_not_counted():
    assert typical([[1.0, 9.0, 1.2], [8.0, 1.1, 1.2]]) == 1.1
