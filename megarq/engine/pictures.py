"""Drawings for a run's log: rows of pictures with their names, and how often each code is chosen.

Shapes: n pictures in a row, R resolution, K codebook size.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

from megarq.files import atomic_file
from megarq.rqvae.health import use_of

_PAD = 2
_SMALLEST_TEXT = 10
_CHART = 512, 96
"""Width and height of one chart, in pixels."""
_DECADES = 2
"""A chart reaches from 1/100 to 100 times the frequency of equal use."""


def save_png(path: Path, picture: Tensor) -> None:
    """Write a picture [3, H, W] in [0, 1], whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        _to_image(picture).save(file, format="PNG")


def labelled_rows(rows: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Rows of pictures [n, 3, R, R] in [-1, 1], each with its name on the left, as one [3, H, W] in [0, 1]."""
    side, count = rows[0][1].shape[-1], len(rows[0][1])
    pictures = torch.cat([row for _, row in rows]).float().cpu().clamp(-1, 1).add(1).div(2)
    grid = make_grid(pictures, nrow=count, padding=_PAD)
    font = ImageFont.load_default(max(_SMALLEST_TEXT, side // 16))
    width = max(int(font.getlength(name)) for name, _ in rows) + 4 * _PAD
    names = Image.new("RGB", (width, grid.shape[1]), "white")
    draw = ImageDraw.Draw(names)
    for index, (name, _) in enumerate(rows):
        middle = _PAD + index * (side + _PAD) + side // 2
        draw.text((2 * _PAD, middle), name, fill="black", font=font, anchor="lm")
    return torch.cat([_to_tensor(names), grid], dim=2)


def frequency_charts(charts: Sequence[tuple[str, Tensor]]) -> Tensor:
    """How often each code was chosen, for named counts [K]: [3, H, W] in [0, 1].

    Codes stand from the most to the least frequent, their height is the logarithm of the frequency. The line in the
    middle is where all would be if they were equally frequent; codes that were never chosen have no height.
    """
    return torch.cat([_frequency_chart(name, counts) for name, counts in charts], dim=1)


def _frequency_chart(name: str, counts: Tensor) -> Tensor:
    width, height = _CHART
    use = use_of(counts)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    text = f"{name}: {use.usage:.0%} used, perplexity {use.perplexity:,.0f} of {len(counts):,}, {use.dead:,} dead"
    draw.text((4, 2), text, fill="black", font=ImageFont.load_default(_SMALLEST_TEXT))
    top, bottom = _SMALLEST_TEXT + 6, height - 2
    ordered = counts.sort(descending=True).values.double()
    columns = ordered[torch.arange(width) * len(counts) // width]
    level = (columns * len(counts) / counts.sum().clamp(min=1)).log10() / (2 * _DECADES) + 0.5
    heights = (level.clamp(0, 1) * (bottom - top)).int()
    for x, (h, count) in enumerate(zip(heights.tolist(), columns.tolist(), strict=True)):
        if count:
            draw.line((x, bottom - max(h, 1), x, bottom), fill="steelblue")
    middle = (top + bottom) // 2
    draw.line((0, middle, width, middle), fill="black")
    return _to_tensor(image)


def _to_image(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
