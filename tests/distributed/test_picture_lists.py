"""Stage 1's pictures: every rank numbers the same list, or none begins."""

from pathlib import Path

import pytest
import torch.distributed as dist
from PIL import Image

from megarq.engine.rqvae_run import open_alike
from megarq.errors import MegarqError


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A folder of two pictures for each of two ranks, which lists them as its own view of one file system."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        for name in ("a", "b"):
            Image.new("RGB", (8, 8)).save(tmp_path / str(rank) / f"{name}.png")
    return tmp_path


def opened(folders: Path) -> int | str:
    try:
        return len(open_alike([str(folders / str(dist.get_rank()))], 0.01))
    except MegarqError as error:
        return str(error)


def test_equal_lists_are_taken(rank_group, folders):
    assert rank_group(2).run(opened, folders) == [2, 2]


@pytest.mark.parametrize(("name", "count"), [("c.png", 3), (None, 2)])
def test_a_rank_that_sees_other_pictures_stops_all(rank_group, folders, name, count):
    if name is None:  # as many pictures, of which one has another name
        (folders / "1" / "b.png").rename(folders / "1" / "c.png")
    else:
        Image.new("RGB", (8, 8)).save(folders / "1" / name)
    for answer in rank_group(2).run(opened, folders):
        assert f"rank 0 lists 2 pictures, rank 1 lists {count}, and not the same" in answer


def test_a_rank_that_sees_nothing_stops_all(rank_group, folders):
    for picture in (folders / "1").iterdir():
        picture.unlink()
    first, second = rank_group(2).run(opened, folders)
    assert "no pictures below" in second and first.startswith("rank 1 failed, so this one stops too: no pictures below")
