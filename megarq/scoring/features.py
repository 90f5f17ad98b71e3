"""Features of pictures: one pass over them through all networks that are needed.

Pictures and features pass by: of most features only the moments are wanted. Those that are held take 400 MB for
50,000 pictures and Inception's 2,048 features.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megarq.data.pictures import PictureBatch, Pictures, PixelStream
from megarq.errors import DataError
from megarq.rqvae.codebook import exact_arithmetic
from megarq.scoring.moments import Moments
from megarq.scoring.networks import Clip, FeatureNetwork

Layer = tuple[str, str]
"""(network, layer)."""


@dataclass
class Features:
    """What networks see in a list of pictures."""

    count: int
    """Pictures."""
    size: tuple[int, int]
    """(width, height) of each."""
    sha256: str
    """Of the pictures' encoded bytes, in order."""
    layers: dict[Layer, Tensor] = field(default_factory=dict)
    """float32 [N, dim] on the CPU, of the layers that are held."""
    moments: dict[Layer, Moments] = field(default_factory=dict)
    """Mean and covariance, of the layers that are summed."""
    cosines: Tensor | None = None
    """[N], CLIP's, of each picture with its prompt."""


@torch.no_grad()
def extract(
    pictures: Pictures,
    networks: Sequence[FeatureNetwork],
    device: torch.device,
    *,
    batch_size: int = 64,
    hold: Collection[Layer] = (),
    summed: Collection[Layer] = (),
    clip: Clip | None = None,
    size: tuple[int, int] | None = None,
    transform: str | None = None,
    workers: int | None = None,
    progress: str = "pictures",
) -> Features:
    """Pass the pictures through the networks, in fp32 without TF32.

    Args:
        hold: layers whose features are held.
        summed: layers whose moments are taken.
        size: what the pictures must have, or are brought to by `transform`; by default that of the first.
        transform: a name in TRANSFORMS, for pictures of other sizes.
        clip: measure each picture against its prompt too.

    Raises:
        DataError: unreadable pictures, mixed sizes, other sizes than asked for, or pictures without prompts for CLIP.
    """
    stream = PixelStream(
        pictures,
        min(batch_size, len(pictures)),
        transform=transform,
        resolution=size[0] if size else None,
        view=clip.view if clip else None,
        workers=workers,
        progress=progress,
    )
    layers: dict[Layer, Tensor] = {}
    moments: dict[Layer, Moments] = {}
    cosines = []
    first = 0
    with exact_arithmetic(device.type):
        for batch in stream:
            if size and stream.size != size:
                raise other_size(stream.size, size)
            pixels = batch.pixels.to(device)
            for network in networks:
                for name, values in zip(network.layers, network.module(pixels), strict=True):
                    layer = (network.name, name)
                    if layer in summed:
                        if first == 0:
                            moments[layer] = Moments.shifted_by(values)
                        moments[layer].add(values)
                    if layer in hold:
                        if first == 0:
                            layers[layer] = torch.empty(len(pictures), values.shape[1])
                        layers[layer][first : first + len(values)] = values.cpu()
            if clip:
                cosines.append(_cosines(clip, batch))
            first += len(pixels)
    assert stream.size is not None and first == len(pictures), "no list of pictures is empty"
    return Features(first, stream.size, stream.sha256, layers, moments, torch.cat(cosines) if clip else None)


def _cosines(clip: Clip, batch: PictureBatch) -> Tensor:
    prompts = [prompt for prompt in batch.prompts if prompt is not None]
    if len(prompts) < len(batch.prompts):
        raise no_prompt(batch.names[batch.prompts.index(None)])
    assert batch.views is not None, "the stream was given CLIP's view"
    return clip.cosines(batch.views, prompts)


def no_prompt(name: str) -> DataError:
    """What to raise where CLIP has nothing to compare a picture with."""
    return DataError(
        f"no prompt beside picture {name}, which the CLIP score needs. Give a picture set or shards with captions, or "
        "leave clip out of --metrics."
    )


def other_size(size: tuple[int, int] | None, wanted: tuple[int, int]) -> DataError:
    """What to raise where the reference has other sizes than the pictures that are scored."""
    got = "x".join(map(str, size or ()))
    return DataError(
        f"the reference's pictures are {got}, those to be scored {wanted[0]}x{wanted[1]}. Make the reference at "
        "their size: --reference-transform center or squeeze for pictures, reference_stats.py --resolution for "
        "statistics."
    )
