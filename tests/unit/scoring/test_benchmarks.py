"""What the benchmarks of scoring make and print; they are run by hand, since Inception takes seconds for each batch."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megarq.scoring.protocols import CleanInception, RqPaperInception

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def protocols() -> dict:
    return runpy.run_path(str(BENCHMARKS / "scoring_protocols.py"))


def test_made_up_pictures_are_the_rounded_floats(protocols, tmp_path):
    floats = protocols["make_pictures"](tmp_path, 2, 32, 0)
    assert floats.shape == (2, 3, 32, 32) and len(list((tmp_path / "reference").iterdir())) == 2
    written = np.asarray(Image.open(tmp_path / "images" / "00001.png"))
    assert np.abs(written / 255 - floats[1].permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def test_variants_differ_from_their_protocols_in_one_thing(protocols):
    pixels = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    corners = protocols["AlignedCorners"].prepare(pixels)
    assert torch.allclose(corners[..., -1, -1], 2 * pixels[..., -1, -1].float() / 255 - 1, atol=1e-4)
    assert (corners - RqPaperInception.prepare(pixels)).abs().max() > 0.1
    rounded = protocols["RoundedClean"].prepare(pixels)
    difference = (rounded - CleanInception.prepare(pixels).clamp(-1, 127 / 128)).abs().max()
    assert 0 < difference <= 0.5 / 128 + 1e-6


def test_the_table_tells_differences_from_rq_paper(protocols):
    table = protocols["table"](
        {"rq-paper": {"fid": 10.0, "kid": 0.5}, "clean": {"fid": 12.5, "kid": 0.25}, "x": {"fid": 9.0}}
    )
    lines = table.splitlines()
    assert lines[0].split() == ["fid", "kid", "fid", "-", "rq-paper"]
    assert [line.split()[-1] for line in lines[1:]] == ["0", "2.5", "-1"]


def test_many_pictures_are_links_to_few_files(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)  # it imports its neighbour
    memory = runpy.run_path(str(BENCHMARKS / "scoring_memory.py"))
    memory["make_pictures"](tmp_path / "many", 40, 16, 0)
    files = sorted((tmp_path / "many").iterdir())
    assert len(files) == 40 and len({file.stat().st_ino for file in files}) == 32
