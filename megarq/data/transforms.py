"""From encoded bytes to a square RGB tensor in [-1, 1]: decoding, and the published crops by name.

Those of ImageNet, FFHQ, LSUN and CC-3M (`t2i`) are the ones of the authors' repository (kakaobrain/rq-vae-transformer,
`create_transforms` of img_datasets and txtimg_datasets), where CC-3M's is called dalle-vqvae.
R is the resolution asked for. Every transform takes an RGB picture, R and a random source, and gives an R x R picture;
all decisions come from the source, so one seed gives one result.
"""

import io
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from megarq.data.faults import Fault
from megarq.errors import DataError

Transform = Callable[[Image.Image, int, random.Random], Image.Image]

_RESIZE = Image.Resampling.BILINEAR
MOST_PIXELS = 10**8
"""A picture of more is taken for a decompression bomb: 0.3 GB as RGB, up to four times as much on the way there."""


def decode_rgb(data: bytes) -> Image.Image:
    """Decode a picture to 8-bit RGB, turned upright; transparency is laid on white, 16-bit grey scaled to 8.

    Of an animation it is the first frame. Raises: DataError where the bytes are no whole picture, or one of more than
    MOST_PIXELS, which is not decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, more than {MOST_PIXELS:,}")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # damaged bytes, in the EXIF too, make Pillow raise anything
        raise unreadable(data, error) from error


class WrongSizeError(DataError):
    """A picture can be read, but not as it is."""


class BadPicture(NamedTuple):
    """Why a picture is skipped."""

    kind: Fault
    reason: str

    @classmethod
    def of(cls, error: Exception) -> "BadPicture":
        """What to count where this was raised of a picture."""
        return cls(Fault.WRONG_SIZE if isinstance(error, WrongSizeError) else Fault.UNREADABLE_IMAGE, str(error))


def unreadable(data: bytes, error: Exception) -> DataError:
    """What to raise where Pillow could not decode these bytes."""
    reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
    return DataError(f"not a readable picture of {len(data)} bytes ({reason}). Replace or remove it.")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        levels = np.clip(np.asarray(image), 0, 65535).astype(np.int32)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as a float tensor [3, height, width] in [-1, 1]."""
    return from_pixels(torch.from_numpy(np.array(image, dtype=np.uint8)))


def from_pixels(pixels: Tensor) -> Tensor:
    """RGB pixels, uint8 [..., height, width, 3], as floats [..., 3, height, width] in [-1, 1]."""
    return pixels.movedim(-1, -3).contiguous().float().div_(127.5).sub_(1.0)


def transform_image(data: bytes, name: str, resolution: int, seed: int = 0) -> Tensor:
    """Decode a picture and apply the named transform: [3, R, R] in [-1, 1].

    Raises: DataError for an unknown name, an unreadable picture, or one that does not fit the transform.
    """
    transform = find_transform(name)
    return to_tensor(transform(decode_rgb(data), resolution, random.Random(seed)))


def find_transform(name: str) -> Transform:
    """The transform of that name. Raises: DataError listing the names there are."""
    if name not in TRANSFORMS:
        raise DataError(f"unknown transform {name!r}. Use one of {', '.join(TRANSFORMS)}.")
    return TRANSFORMS[name]


def _resize_short_side(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    if short == size:
        return image
    if size * size * max(width, height) > MOST_PIXELS * short:
        raise DataError(
            f"a picture of {width}x{height}, whose short side at {size} makes it more than {MOST_PIXELS:,} pixels. "
            "Remove or crop it."
        )
    return image.resize((max(size, round(width * size / short)), max(size, round(height * size / short))), _RESIZE)


def _crop(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def _centre_crop(image: Image.Image, size: int) -> Image.Image:
    return _crop(image, (image.width - size) // 2, (image.height - size) // 2, size)


def _random_crop(image: Image.Image, size: int, source: random.Random) -> Image.Image:
    return _crop(image, source.randint(0, image.width - size), source.randint(0, image.height - size), size)


def _random_flip(image: Image.Image, source: random.Random) -> Image.Image:
    return ImageOps.mirror(image) if source.random() < 0.5 else image


def _none(image: Image.Image, size: int, source: random.Random) -> Image.Image:
    """The picture as it is, which must be R x R."""
    if image.size != (size, size):
        raise WrongSizeError(
            f"a picture of {image.width}x{image.height} with transform none at resolution {size}. "
            f"Use transform center (--transform, or data.transform of a run), or pictures of {size}x{size}."
        )
    return image


def _center(image: Image.Image, size: int, source: random.Random) -> Image.Image:
    """The short side becomes R, then the centre R x R."""
    return _centre_crop(_resize_short_side(image, size), size)


def _squeeze(image: Image.Image, size: int, source: random.Random) -> Image.Image:
    """Both sides become R, whatever the picture's shape: what the authors compare text-to-image models with."""
    return image.resize((size, size), _RESIZE)


def _imagenet(image: Image.Image, size: int, source: random.Random) -> Image.Image:
    """The short side becomes R, then any R x R, mirrored half of the time."""
    return _random_flip(_random_crop(_resize_short_side(image, size), size, source), source)


def _ffhq(image: Image.Image, size: int, source: random.Random) -> Image.Image:
    """Any square of 0.75 to 1 of the area becomes R x R, mirrored half of the time."""
    side = max(1, min(*image.size, round((image.width * image.height * source.uniform(0.75, 1.0)) ** 0.5)))
    cropped = _random_crop(image, side, source)
    return _random_flip(cropped.resize((size, size), _RESIZE), source)


def _lsun(image: Image.Image, size: int, source: random.Random) -> Image.Image:
    """The short side becomes R, then the centre R x R: in training, too, nothing is decided by chance."""
    return _center(image, size, source)


def _t2i(image: Image.Image, size: int, source: random.Random) -> Image.Image:
    """The text-to-image crop of Ramesh et al. (2021, listing 1), with smaller pictures enlarged instead of dropped.

    A square near the centre (its offset is 3/8 to 5/8 of the slack) becomes R to 9/8 R wide; then any R x R of it.
    """
    side = min(image.size)
    left, top = (source.randint(3 * (length - side) // 8, 5 * (length - side) // 8) for length in image.size)
    width = source.randint(size, max(size, min(side, round(size * 9 / 8))))
    return _random_crop(_crop(image, left, top, side).resize((width, width), _RESIZE), size, source)


TRANSFORMS: dict[str, Transform] = {
    "center": _center,
    "squeeze": _squeeze,
    "none": _none,
    "imagenet": _imagenet,
    "ffhq": _ffhq,
    "lsun": _lsun,
    "t2i": _t2i,
}
