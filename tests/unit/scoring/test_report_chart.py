import re

import pytest

from megarq.scoring.report_chart import Point, line_chart, number, ticks


def test_a_chart_tells_its_numbers_to_those_who_cannot_see_it():
    made = line_chart("FID", {"a": [Point(1000, 20.0, [19.0, 21.5]), Point(4000, 10.0)]})
    assert 'role="img" aria-label="FID against checkpoint step. 20 at step 1,000, 10 at step 4,000"' in made


def test_points_lie_where_their_numbers_say():
    made = line_chart("FID", {"a": [Point(0, 20.0), Point(1000, 10.0), Point(2000, 15.0)]})
    places = [tuple(map(float, place)) for place in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', made)]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y1 - y0 == pytest.approx(2 * (y1 - y2), abs=0.21) and y1 > y0  # SVG's y goes down


def test_equal_values_make_a_chart_too():
    assert line_chart("FID", {"a": [Point(1, 0.0), Point(2, 0.0)]}).count("<circle") == 2


@pytest.mark.parametrize("low, high, shown", [(0, 10, [0, 2.5, 5, 7.5, 10]), (0.11, 0.19, [0.12, 0.14, 0.16, 0.18])])
def test_ticks_are_round(low, high, shown):
    assert ticks(low, high, 4) == pytest.approx(shown)


@pytest.mark.parametrize(
    "value, shown", [(12.3456, "12.35"), (0.00123456, "0.001235"), (-0.5, "−0.5"), (54321.9, "54,322")]
)
def test_numbers_have_four_digits(value, shown):
    assert number(value) == shown
