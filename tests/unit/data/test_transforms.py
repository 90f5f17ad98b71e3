"""Decoding of every kind of picture, and the named crops."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

from megarq.data.transforms import TRANSFORMS, decode_rgb, to_tensor, transform_image
from megarq.errors import DataError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def photo(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


def colour(data: bytes) -> tuple[int, ...]:
    image = decode_rgb(data)
    assert image.mode == "RGB"
    return image.getpixel((1, 1))  # type: ignore[return-value]


def test_grey_becomes_rgb() -> None:
    assert colour(encoded(Image.new("L", (4, 4), 90))) == (90, 90, 90)


def test_black_and_white_becomes_rgb() -> None:
    assert colour(encoded(Image.new("1", (4, 4), 1))) == (255, 255, 255)


def test_a_palette_becomes_rgb() -> None:
    assert colour(encoded(Image.new("RGB", (4, 4), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE))) == (
        10,
        200,
        30,
    )


def test_transparent_pixels_become_white() -> None:
    assert colour(encoded(Image.new("RGBA", (4, 4), (10, 20, 30, 0)))) == (255, 255, 255)


def test_half_transparent_pixels_are_blended_with_white() -> None:
    assert colour(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))) == (127, 127, 127)


def test_transparent_grey_becomes_white() -> None:
    assert colour(encoded(Image.new("LA", (4, 4), (10, 0)))) == (255, 255, 255)


def test_a_transparent_palette_entry_becomes_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([1, 2, 3])
    assert colour(encoded(image, transparency=0)) == (255, 255, 255)


def test_cmyk_becomes_rgb() -> None:
    red, green, blue = colour(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize(("level", "expected"), [(0, 0), (257 * 128, 128), (65535, 255)])
def test_16_bit_grey_is_scaled_to_8_bits(level: int, expected: int) -> None:
    pixels = np.full((4, 4), level, np.uint16)
    assert colour(encoded(Image.fromarray(pixels))) == (expected,) * 3


def test_pictures_are_turned_upright() -> None:
    image = Image.new("RGB", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_rgb(encoded(image, "JPEG", exif=exif)).size == (4, 8)


@pytest.mark.parametrize("data", [b"", b"not a picture", photo(32, 32)[:200]], ids=["empty", "text", "truncated"])
def test_bytes_that_are_no_whole_picture_are_a_data_error(data: bytes) -> None:
    with pytest.raises(DataError, match="not a readable picture"):
        decode_rgb(data)


def test_a_damaged_exif_block_is_a_data_error() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    whole = encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)
    with pytest.raises(DataError, match="no attribute 'encode'"):  # a description that is a number
        decode_rgb(whole.replace(b"\x01\x1a\x00\x05", b"\x01\x0e\x00\x05"))


def test_tensors_span_minus_one_to_one() -> None:
    image = Image.new("RGB", (2, 1))
    image.putpixel((1, 0), (255, 255, 0))
    assert torch.equal(to_tensor(image), torch.tensor([[[-1.0, 1.0]], [[-1.0, 1.0]], [[-1.0, -1.0]]]))


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "none"])
@pytest.mark.parametrize("size", [(40, 24), (17, 33), (8, 5), (16, 16)])
def test_every_transform_gives_a_square(name: str, size: tuple[int, int]) -> None:
    for seed in range(5):
        tensor = transform_image(photo(*size), name, 16, seed)
        assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32 and tensor.abs().max() <= 1


@pytest.mark.parametrize("name", ["imagenet", "ffhq", "t2i"])
def test_training_transforms_follow_their_seed(name: str) -> None:
    data = photo(40, 24)
    first = transform_image(data, name, 16, seed=1)
    assert torch.equal(first, transform_image(data, name, 16, seed=1))
    assert any(not torch.equal(first, transform_image(data, name, 16, seed=seed)) for seed in range(2, 8))


@pytest.mark.parametrize("name", ["center", "lsun"])
def test_the_middle_is_taken_whatever_the_seed(name: str) -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = 255
    data = encoded(Image.fromarray(pixels))
    assert all((transform_image(data, name, 8, seed) == 1).all() for seed in range(6))


@pytest.mark.parametrize("size", [(40, 24), (9, 33), (16, 16)])
def test_squeeze_is_the_authors_resize_of_both_sides(size: tuple[int, int]) -> None:
    theirs = Compose([Resize(size=(16, 16)), ToTensor(), Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
    data = photo(*size)
    assert torch.allclose(transform_image(data, "squeeze", 16), theirs(decode_rgb(data)), atol=1e-6)


def test_ffhq_crops_before_it_scales() -> None:
    """A face of 1024 pixels keeps its detail, which is lost where 256 are enlarged."""
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, np.arange(128) // 4 % 2 == 0] = 255
    data = encoded(Image.fromarray(stripes))
    steps = [transform_image(data, "ffhq", 32, seed)[0].diff(dim=1).square().mean().sqrt() for seed in range(10)]
    assert min(steps) > 0.66  # 0.57 where they are scaled to 32 pixels first


def test_ffhq_takes_three_quarters_of_the_area_or_more() -> None:
    data = encoded(Image.fromarray(np.repeat(np.arange(200, dtype=np.uint8)[:, None], 200, axis=1)))
    spans = []
    for seed in range(40):
        rows = (transform_image(data, "ffhq", 200, seed)[0, :, 0] + 1) * 127.5
        spans.append((rows[-1] - rows[0]).item())
    assert 200 * 0.75**0.5 - 3 <= min(spans) < 180 and 190 < max(spans) <= 199


def test_none_keeps_the_pixels() -> None:
    assert torch.equal(transform_image(photo(16, 16), "none", 16), to_tensor(decode_rgb(photo(16, 16))))


def test_none_refuses_another_size() -> None:
    with pytest.raises(DataError, match="picture of 16x8 with transform none at resolution 16"):
        transform_image(photo(16, 8), "none", 16)


def test_an_unknown_transform_lists_the_known() -> None:
    with pytest.raises(DataError, match=r"unknown transform 'centre'\. Use one of center, squeeze, none, imagenet"):
        transform_image(photo(16, 16), "centre", 16)


def test_t2i_crops_near_the_centre() -> None:
    pixels = np.full((16, 160, 3), 255, np.uint8)
    pixels[:, 50:110] = 0
    data = encoded(Image.fromarray(pixels))
    assert all((transform_image(data, "t2i", 16, seed) == -1).all() for seed in range(20))
