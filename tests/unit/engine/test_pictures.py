"""Drawings for a run's log."""

import pytest
import torch
from PIL import Image

from megarq.engine.pictures import frequency_charts, labelled_rows, save_png

WHITE, BLUE = (255, 255, 255), (70, 130, 180)


def grey(value: float, count: int = 4, side: int = 32) -> torch.Tensor:
    return torch.full((count, 3, side, side), value)


def test_rows_stand_below_each_other_with_room_for_names():
    rows = labelled_rows([("original", grey(-1.0)), ("depth 1", grey(0.0)), ("depths 1-2", grey(3.0))])
    height, width = 3 * (32 + 2) + 2, 4 * (32 + 2) + 2
    assert rows.shape[0] == 3 and rows.shape[1] == height and rows.shape[2] > width + 30
    middles = rows[:, [18, 52, 86], -10]
    torch.testing.assert_close(middles, torch.tensor([0.0, 0.5, 1.0]).expand(3, 3))


def test_each_row_has_its_name():
    nameless = labelled_rows([("", grey(0.0)), ("a name", grey(0.0))])
    names = nameless[:, :, : nameless.shape[2] - 138]
    above, below = names[:, :36], names[:, 36:]
    assert (above == 1).all() and (below < 0.5).any()


@pytest.mark.parametrize("side", [8, 32, 256])
def test_names_fit_beside_pictures_of_any_size(side):
    rows = labelled_rows([("reconstruction", grey(0.0, 2, side))])
    names = rows[:, :, : rows.shape[2] - 2 * (side + 2) - 2]
    dark = (names < 0.5).any(0).any(0).nonzero()
    assert dark.min() > 0 and dark.max() < names.shape[2] - 1


def blue(chart: torch.Tensor) -> torch.Tensor:
    """Where a chart [3, H, W] is filled, [H, W]."""
    return (chart - torch.tensor(BLUE).view(3, 1, 1) / 255).abs().amax(0) < 0.01


def test_equal_frequencies_reach_the_middle_line():
    (chart,) = [frequency_charts([("depth 1", torch.full((64,), 9))])]
    columns = blue(chart).sum(0)
    assert columns.min() == columns.max() > 30


def test_dead_codes_leave_the_right_of_the_chart_empty():
    counts = torch.zeros(64, dtype=torch.int64)
    counts[::4] = 5
    filled = blue(frequency_charts([("depth 1", counts)])).any(0)
    assert filled[:128].all() and not filled[128:].any()


def test_frequent_codes_stand_higher():
    columns = blue(frequency_charts([("depth 1", torch.tensor([1, 100, 10, 1]))])).sum(0)
    assert columns[0] > columns[200] > columns[-1]


def test_charts_of_all_depths_stand_below_each_other():
    one = frequency_charts([("depth 1", torch.ones(8))])
    three = frequency_charts([(f"depth {depth}", torch.ones(8)) for depth in (1, 2, 3)])
    assert three.shape == (3, 3 * one.shape[1], one.shape[2])


def test_a_chart_of_no_codes_is_drawn():
    assert not blue(frequency_charts([("depth 1", torch.zeros(8))])).any()


def test_a_png_has_the_picture(tmp_path):
    picture = torch.zeros(3, 2, 5)
    picture[0, 1, 4] = 1.0
    save_png(tmp_path / "new" / "one.png", picture)
    with Image.open(tmp_path / "new" / "one.png") as image:
        assert image.size == (5, 2) and image.getpixel((4, 1)) == (255, 0, 0) and image.getpixel((0, 0)) == (0, 0, 0)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["one.png"]
