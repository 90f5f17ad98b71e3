"""Looking at code shards: pictures decoded from their codes, beside their captions and against the originals."""

import random
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from megarq.data.faults import Faults
from megarq.data.image_shards import read_samples
from megarq.data.transforms import decode_rgb, find_transform, from_pixels
from megarq.errors import DataError
from megarq.inference.generator import to_pictures
from megarq.parallel.initialization import derived_seed
from megarq.pretokenize.decoder import Pixels
from megarq.pretokenize.encoder import BlockEncoder
from megarq.pretokenize.samples import Samples
from megarq.rqvae.model import RQVAE

BATCH = 16
"""Pictures decoded from codes at once."""
SHARDS = 8
"""Image shards read at most to find the originals."""
SIDE, TEXT, PAD = 160, 240, 8
"""Pixels in the grid: least side of a picture, width of its caption, space around."""


@torch.no_grad()
def decode(rqvae: RQVAE, codes: Tensor) -> Tensor:
    """Codes [n, H, W, D] -> pictures [n, 3, R, R] on the CPU, clamped to [-1, 1]."""
    device = next(rqvae.parameters()).device
    parts = [rqvae.decode(part.to(device)).clamp(-1, 1).cpu() for part in codes.split(BATCH)]
    return torch.cat(parts)


def grid(samples: Samples, rqvae: RQVAE, count: int, seed: int = 0) -> Image.Image:
    """A seeded choice of samples, each decoded from its argmin codes, with its first caption at its right."""
    chosen = sorted(random.Random(seed).sample(range(len(samples)), min(count, len(samples))))
    pictures = to_pictures(decode(rqvae, _codes(samples, chosen)))
    columns = max(1, round((len(chosen) / 2) ** 0.5))
    side = max(SIDE, pictures[0].width)
    width, height = side + TEXT + 3 * PAD, side + 2 * PAD
    sheet = Image.new("RGB", (columns * width, -(-len(chosen) // columns) * height), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for place, (sample, picture) in enumerate(zip(chosen, pictures, strict=True)):
        left, top = place % columns * width + PAD, place // columns * height + PAD
        sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (left, top))
        captions = samples.captions(sample)
        text = [samples.name(sample), "", *textwrap.wrap(captions[0] if captions else "(no caption)", 38)]
        canvas.multiline_text((left + side + PAD, top), "\n".join(text[: side // 12]), "black", font)
    return sheet


@dataclass(frozen=True)
class Reconstruction:
    """Codes held against the pictures that they were made from."""

    pictures: int
    """Pictures compared."""
    mse: float
    """Mean squared difference of decoded and original pictures, in [-1, 1]."""
    psnr: float
    """10 log10(4 / mse) in dB, averaged over pictures."""
    agreement: list[float]
    """Share of codes at each depth that encoding the originals again gives."""
    missing: list[str]
    """Samples whose picture is not in its image shard, or cannot be read."""


def reconstruction(
    samples: Samples, rqvae: RQVAE, sources: Mapping[str, str], count: int, seed: int = 0
) -> Reconstruction:
    """Compare a seeded choice of samples, out of a few shards, with their originals.

    sources: the image shards by the name that the manifest has for them.
    Raises: DataError where none of the shards is among them.
    """
    there = [place for place, record in enumerate(samples.records) if record.samples and record.source in sources]
    if not there:
        raise DataError(
            f"none of the {len(sources)} image shards given is a source of these codes, which were made from "
            f"{samples.records[0].source!r} and others. Give --images the shards that were pretokenized."
        )
    source = random.Random(seed)
    shards = sorted(source.sample(there, min(SHARDS, len(there))))
    device = next(rqvae.parameters()).device
    encoder = BlockEncoder(rqvae, replace(samples.settings, compiled=False), device)
    errors: list[Tensor] = []
    equal: list[Tensor] = []
    missing: list[str] = []
    for number, place in enumerate(shards):
        wanted = count // len(shards) + (number < count % len(shards))
        chosen = source.sample(samples.of_shard(place), min(wanted, samples.records[place].samples))
        originals = _originals(samples, chosen, sources[samples.records[place].source])
        missing.extend(samples.name(sample) for sample in chosen if sample not in originals)
        found = list(originals)
        for first in range(0, len(found), samples.settings.batch_size):
            part = found[first : first + samples.settings.batch_size]
            codes, pixels = _codes(samples, part), np.stack([originals[sample] for sample in part])
            errors.append((decode(rqvae, codes) - from_pixels(torch.from_numpy(pixels))).square().mean((1, 2, 3)))
            equal.append((rqvae.quantize(encoder.encode(pixels)).cpu() == codes).float().mean((1, 2)))
    if not errors:
        return Reconstruction(0, float("nan"), float("nan"), [], missing)
    error = torch.cat(errors)
    psnr = (10 * torch.log10(4 / error.clamp_min(1e-10))).mean()
    return Reconstruction(len(error), float(error.mean()), float(psnr), torch.cat(equal).mean(0).tolist(), missing)


def _originals(samples: Samples, chosen: Sequence[int], source: str) -> dict[int, Pixels]:
    """The transformed pictures [R, R, 3] of samples of one shard, of those that are found."""
    settings, found = samples.settings, dict[int, Pixels]()
    transform = find_transform(settings.transform)
    by_key = {samples.key(sample): sample for sample in chosen}
    for image in read_samples(source, Faults(grace=2**62)):
        sample = by_key.pop(image.key, None)
        if sample is not None:
            source_of_crop = random.Random(derived_seed(settings.seed, image.key))
            with suppress(DataError):
                picture = transform(decode_rgb(image.image), settings.resolution, source_of_crop)
                found[sample] = np.asarray(picture, np.uint8)
        if not by_key:
            break
    return found


def _codes(samples: Samples, chosen: Sequence[int]) -> Tensor:
    return torch.from_numpy(samples.codes(chosen).astype("int64"))
