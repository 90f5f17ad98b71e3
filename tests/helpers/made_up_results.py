"""Results and picture sets that nobody drew or scored: pictures of one colour each, scores out of the air.

draw_set(folder, items)      a whole set of len(items) pictures, as evaluation/coco.py leaves it
made_up_result(folder)       what evaluation/score.py would say of it, to be changed by the fields named
"""

import colorsys
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megarq.data.picture_set import Item, PictureSet, PictureSettings, Sample, items_digest

FINGERPRINT = "c0ffee" * 10 + "beef"
SIDE = 32


def colour(index: int) -> tuple[int, int, int]:
    """A colour of its own for each of many pictures."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.381966 % 1, 0.55 + 0.4 * (index % 2), 0.9 - 0.1 * (index % 3))
    return round(255 * red), round(255 * green), round(255 * blue)


def plain(index: int, side: int = SIDE) -> Image.Image:
    """A picture of that colour."""
    return Image.new("RGB", (side, side), colour(index))


def draw_set(folder: Path, items: Sequence[Item], seed: int = 0, side: int = SIDE, per_tar: int = 10) -> Path:
    """Picture i has colour(i + seed)."""
    settings = PictureSettings(
        count=len(items),
        pictures_per_tar=per_tar,
        condition="text",
        seed=seed,
        sampling={"top_k": 1024, "top_p": 0.95, "temperature": 1.0},
        batch_size=per_tar,
        dtype="fp32",
        threads=1,
        model={"fingerprint": FINGERPRINT, "name": "model", "weights": "ema", "step": 1000},
        items=items_digest(items),
        keep_fraction=1.0,
        ranker=None,
        resolution=side,
    )
    places = [range(first, min(first + per_tar, len(items))) for first in range(0, len(items), per_tar)]
    drawn = PictureSet(folder, settings, places)
    for number, indexes in enumerate(places):
        drawn.write(number, [Sample(items[index], plain(index + seed, side)) for index in indexes])
    assert drawn.finish()
    return folder


def made_up_result(images: Path | str, count: int, **changes: Any) -> dict[str, Any]:
    """A result of scoring `count` pictures."""
    inception = {"network": "inception", "layer": "2048"}
    return {
        "format": "megarq-scores",
        "version": 1,
        "metrics": {
            "fid": {"value": 12.3456, "interval": [11.9, 12.7], **inception},
            "is": {"value": 25.5, "std": 0.31, "splits": 10, "interval": None, "network": "inception"},
            "precision": {"value": 0.66, "interval": None, **inception, "neighbours": 3},
            "recall": {"value": 0.5, "interval": None, **inception, "neighbours": 3},
            "clip": {"value": 0.31, "interval": None, "std": 0.02, "network": "clip", "resize": "short side to 224"},
        },
        "protocol": {
            "name": "rq-paper",
            "input": "float32 in [0, 1]",
            "resize": "bilinear to 299x299, half-pixel centres, no antialiasing",
            "normalize": "2x - 1",
            "statistics": "mean and covariance in float64",
        },
        "count": count,
        "resize": "bilinear to 299x299, half-pixel centres, no antialiasing",
        "seed": 0,
        "model_fingerprint": FINGERPRINT,
        "ema": True,
        "step": 1000,
        "weights_sha256": {"inception": "ab" * 32, "clip": "cd" * 32},
        "reference_sha256": "ef" * 32,
        "reference": {"path": "coco-val.npz", "kind": "statistics", "count": 40504, "size": [SIDE, SIDE]},
        "images": {
            "path": str(images),
            "kind": "set",
            "sha256": "12" * 32,
            "size": [SIDE, SIDE],
            "sampling": {"top_k": 1024, "top_p": 0.95, "temperature": 1.0},
            "dtype": "fp32",
            "keep_fraction": 1.0,
            "ranker": None,
        },
        "scored_seed": 2020,
        "bootstrap": 100,
        "warnings": [],
        "machine": {"cores": 2, "load": 0.5, "gpu": None, "python": "3.11.7", "torch": "2.15.0"},
        **changes,
    }


def write(path: Path, content: dict[str, Any]) -> Path:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path
