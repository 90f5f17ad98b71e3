"""Looking at code shards: pictures decoded from their codes, beside their captions and against the originals."""

import random
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from megarq.data.code_shards import CodeShards
from megarq.data.faults import Faults
from megarq.data.image_shards import read_samples
from megarq.data.order import IntArray
from megarq.data.sources import source_name
from megarq.data.transforms import BadPicture, from_pixels
from megarq.errors import DataError
from megarq.inference.generator import to_pictures
from megarq.parallel.initialization import derived_seed
from megarq.pretokenize.decoder import Pixels, decode_pictures
from megarq.pretokenize.encoder import BlockEncoder
from megarq.rqvae.model import RQVAE

BATCH = 16
"""Pictures decoded from codes at once."""
SHARDS = 8
"""Image shards read at most to find the originals."""
SIDE, TEXT, PAD = 160, 240, 8
"""Pixels in the grid: least side of a picture, width of its caption, space around."""


def places(shards: CodeShards, samples: Sequence[int]) -> tuple[IntArray, IntArray]:
    """(block, row) [n] of the n-th samples of a view, sample 0 being the first of its first block."""
    ends, numbers = np.cumsum(shards.block_sizes), np.array(samples, np.int64)
    blocks = np.searchsorted(ends, numbers, "right")
    return blocks, numbers - (ends - shards.block_sizes)[blocks]


def names(shards: CodeShards, samples: Sequence[int]) -> list[str]:
    """`000017.tar/KEY` of each, as exclusion lists have it."""
    found = zip(*(place.tolist() for place in places(shards, samples)), strict=True)
    return [f"{shards.file_of(block)}/{shards.key(block, row)}" for block, row in found]


def by_source_name(images: Sequence[str]) -> dict[str, str]:
    """Image shards by the name that manifests have for them. Raises: DataError where two have the same."""
    found: dict[str, str] = {}
    for shard in images:
        if found.setdefault(source_name(shard), shard) != shard:
            raise DataError(
                f"image shards {found[source_name(shard)]} and {shard} have the same name in manifests. "
                "Give only those that these codes were made from."
            )
    return found


@torch.no_grad()
def decode(rqvae: RQVAE, codes: Tensor) -> Tensor:
    """Codes [n, H, W, D] -> pictures [n, 3, R, R] on the CPU, clamped to [-1, 1]."""
    device = next(rqvae.parameters()).device
    parts = [rqvae.decode(part.to(device)).clamp(-1, 1).cpu() for part in codes.split(BATCH)]
    return torch.cat(parts)


def grid(shards: CodeShards, rqvae: RQVAE, count: int, seed: int = 0) -> Image.Image:
    """A seeded choice of samples, each decoded from its argmin codes, with its first caption at its right."""
    chosen = sorted(random.Random(seed).sample(range(shards.samples), min(count, shards.samples)))
    pictures = to_pictures(decode(rqvae, _codes(shards, chosen)))
    labels, rows = names(shards, chosen), np.stack(places(shards, chosen), 1).tolist()
    columns = max(1, round((len(chosen) / 2) ** 0.5))
    side = max(SIDE, pictures[0].width)
    width, height = side + TEXT + 3 * PAD, side + 2 * PAD
    sheet = Image.new("RGB", (columns * width, -(-len(chosen) // columns) * height), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for place, picture in enumerate(pictures):
        left, top = place % columns * width + PAD, place // columns * height + PAD
        sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (left, top))
        captions = shards.captions(*rows[place])
        text = [labels[place], "", *textwrap.wrap(captions[0] if captions else "(no caption)", 38)]
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
    shards: CodeShards, rqvae: RQVAE, sources: Mapping[str, str], count: int, seed: int = 0
) -> Reconstruction:
    """Compare a seeded choice of samples, out of a few shards, with their originals.

    sources: the image shards by the name that the manifest has for them.
    Raises: DataError where none of the shards is among them.
    """
    manifest, files = shards.manifest, {shards.file_of(block) for block in range(len(shards.block_sizes))}
    whole = [number for number, record in enumerate(manifest.shards) if record.file in files]
    there = [number for number in whole if manifest.shards[number].source in sources]
    if not there:
        raise DataError(
            f"none of the {len(sources)} image shards given is a source of these codes, which were made from "
            f"{manifest.shards[whole[0]].source!r} and others. Give --images the shards that were pretokenized."
        )
    choice, settings = random.Random(seed), manifest.settings
    read = sorted(choice.sample(there, min(SHARDS, len(there))))
    encoder = BlockEncoder(rqvae, replace(settings, compiled=False), next(rqvae.parameters()).device)
    errors: list[Tensor] = []
    equal: list[Tensor] = []
    missing: list[str] = []
    for place, number in enumerate(read):
        shard = CodeShards(shards.folder, manifest, [number])
        wanted = count // len(read) + (place < count % len(read))
        chosen = choice.sample(range(shard.samples), min(wanted, shard.samples))
        originals = _originals(shard, chosen, sources[manifest.shards[number].source])
        missing.extend(names(shard, [sample for sample in chosen if sample not in originals]))
        found = list(originals)
        for first in range(0, len(found), settings.batch_size):
            part = found[first : first + settings.batch_size]
            codes, pixels = _codes(shard, part), np.stack([originals[sample] for sample in part])
            errors.append((decode(rqvae, codes) - from_pixels(torch.from_numpy(pixels))).square().mean((1, 2, 3)))
            equal.append((rqvae.quantize(encoder.encode(pixels)).cpu() == codes).float().mean((1, 2)))
    if not errors:
        return Reconstruction(0, float("nan"), float("nan"), [], missing)
    error = torch.cat(errors)
    psnr = (10 * torch.log10(4 / error.clamp_min(1e-10))).mean()
    return Reconstruction(len(error), float(error.mean()), float(psnr), torch.cat(equal).mean(0).tolist(), missing)


def _originals(shard: CodeShards, chosen: Sequence[int], source: str) -> dict[int, Pixels]:
    """The transformed pictures [R, R, 3] of samples of one shard, of those that are found."""
    ours, found = shard.settings, dict[int, Pixels]()
    blocks, rows = (place.tolist() for place in places(shard, chosen))
    by_key = {shard.key(*place): sample for *place, sample in zip(blocks, rows, chosen, strict=True)}
    for image in read_samples(source, Faults(grace=2**62), ours.caption_field):
        if image.key in by_key:
            seeded = [(image.image, derived_seed(ours.seed, image.key))]
            sample, [picture] = by_key.pop(image.key), decode_pictures(seeded, ours.transform, ours.resolution)
            if not isinstance(picture, BadPicture):
                found[sample] = picture
        if not by_key:
            break
    return found


def _codes(shards: CodeShards, chosen: Sequence[int]) -> Tensor:
    return torch.from_numpy(shards.read_codes(*places(shards, chosen)).astype("int64"))
