"""Whatever stands in a picture's place is converted to the right colours, or counted: nothing crashes the loader."""

import io
import logging
import struct
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megarq.data.image_sources import open_images
from megarq.data.images import ImageLoader
from megarq.data.transforms import TRANSFORMS, decode_rgb, transform_image
from megarq.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")

SIDE = 8
RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)
RIGHT_TOP = 6
"""EXIF's orientation of a picture whose first row is its right side."""


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def plain(mode: str, colour: object, size: tuple[int, int] = (16, 12)) -> Image.Image:
    return Image.new(mode, size, colour)  # type: ignore[arg-type]


def png_of(width: int, height: int, depth: int, kind: int, row: bytes, **chunks: bytes) -> bytes:
    """A PNG of equal rows, in formats that Pillow does not write; `kind` 0 is grey, 2 RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(1)
    pixels = b"".join(packer.compress(b"\0" + row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def palette(transparent: bool) -> bytes:
    image = plain("P", 1)
    image.putpalette([9, 9, 9, *GREEN])
    return encoded(image, transparency=1) if transparent else encoded(image)


def deep(kind: int, *values: int) -> bytes:
    return png_of(16, 12, 16, kind, struct.pack(f">{len(values)}H", *values) * 16)


def animation(kind: str) -> bytes:
    first, second = plain("RGB", RED), plain("RGB", GREEN)
    return encoded(first, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "WEBP" else {}))


def turned() -> bytes:
    """A picture whose red left half stands on top once it is turned upright."""
    image = plain("RGB", GREEN, (32, 16))
    image.paste(RED, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = RIGHT_TOP
    return encoded(image, exif=exif)


CONVERTED: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "grey": (encoded(plain("L", 90)), (90, 90, 90)),
    "grey JPEG": (encoded(plain("L", 90), "JPEG"), (90, 90, 90)),
    "one bit": (encoded(plain("1", 1)), WHITE),
    "CMYK": (encoded(plain("CMYK", (51, 102, 153, 0)), "JPEG", quality=100), (204, 153, 102)),
    "palette": (palette(transparent=False), GREEN),
    "palette with transparency": (palette(transparent=True), WHITE),
    "16-bit grey": (deep(0, 257 * 200), (200, 200, 200)),
    "16-bit grey with alpha": (deep(4, 257 * 200, 65535), (200, 200, 200)),
    "16-bit RGB": (deep(2, 257 * 200, 257 * 100, 257 * 7), (200, 100, 7)),
    "16-bit RGBA": (deep(6, 257 * 200, 0, 0, 0), WHITE),
    "alpha": (encoded(plain("RGBA", (0, 0, 0, 128))), (127, 127, 127)),
    "transparent WebP": (encoded(plain("RGBA", (1, 2, 3, 0)), "WEBP", lossless=True), WHITE),
    "grey with alpha": (encoded(plain("LA", (10, 0))), WHITE),
    "an RGB colour that is transparent": (png_of(16, 12, 8, 2, bytes(RED) * 16, tRNS=b"\0\xff\0\0\0\0"), WHITE),
    "1x1": (encoded(plain("RGB", RED, (1, 1))), RED),
    "10x4000": (encoded(plain("RGB", RED, (10, 4000))), RED),
    "4000x10": (encoded(plain("RGB", GREEN, (4000, 10))), GREEN),
    "animated GIF": (animation("GIF"), RED),
    "animated WebP": (animation("WEBP"), RED),
    "TIFF of floats": (encoded(plain("F", 77.0), "TIFF"), (77, 77, 77)),
    "BMP": (encoded(plain("RGB", RED), "BMP"), RED),
}
JPEG = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG")
COUNTED: dict[str, bytes] = {
    "zero bytes": b"",
    "a text": b"<html><body>404 not found</body></html>\n" * 20,
    "a truncated JPEG": JPEG[: len(JPEG) // 2],
    "a truncated PNG": encoded(Image.effect_noise((64, 64), 80))[:-60],
    "a header alone": JPEG[:40],
    "zeros": bytes(5000),
    "a PNG with a wrong checksum": png_of(16, 12, 8, 2, bytes(RED) * 16).replace(b"IHDR", b"IHDS"),
    "a decompression bomb": png_of(20000, 20000, 1, 0, bytes(2500)),
    "a bomb below Pillow's own limit": png_of(11000, 11000, 1, 0, bytes(1375)),
    "too narrow to be scaled": encoded(plain("RGB", RED, (1, 60000))),
}


def pixel(tensor: torch.Tensor) -> list[int]:
    """The colour of a picture [3, R, R] of one colour; JPEG may be off by one somewhere."""
    levels = ((tensor + 1) * 127.5).round().flatten(1)
    assert (levels.amax(1) - levels.amin(1)).max() <= 1
    return levels.median(dim=1).values.int().tolist()


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "none"])
@pytest.mark.parametrize("kind", CONVERTED)
def test_a_picture_becomes_its_colours(kind: str, name: str) -> None:
    data, colour = CONVERTED[kind]
    assert pixel(transform_image(data, name, SIDE, seed=3)) == list(colour)


@pytest.mark.parametrize("kind", CONVERTED)
def test_the_loader_gives_a_pictures_colours(kind: str, make_tar: Callable[..., str]) -> None:
    data, colour = CONVERTED[kind]
    tar = make_tar("x.tar", {"a.jpg": data})  # the ending says nothing
    (batch,) = islice(ImageLoader(open_images([tar]), "imagenet", SIDE, 2, max_bad_rate=0.0), 1)
    assert [pixel(image) for image in batch.images] == [list(colour)] * 2


def test_a_turned_picture_stands_upright() -> None:
    upright = transform_image(turned(), "center", SIDE)
    assert pixel(upright[:, : SIDE // 2 - 1]) == list(RED) and pixel(upright[:, SIDE // 2 + 1 :]) == list(GREEN)


@pytest.mark.parametrize("kind", COUNTED)
def test_what_is_no_picture_is_a_data_error(kind: str) -> None:
    with pytest.raises(DataError, match=r"not a readable picture of \d+ bytes|a picture of 1x60000, whose short side"):
        transform_image(COUNTED[kind], "imagenet", 256)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_counts_what_is_no_picture_and_goes_on(
    workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, data in enumerate(COUNTED.values()):
        (folder / f"{number}.jpg").write_bytes(data)
    (folder / "good.png").write_bytes(encoded(plain("RGB", RED)))
    loader = ImageLoader(
        open_images([str(folder)]), "imagenet", 256, len(COUNTED) + 1, workers=workers, max_bad_rate=0.9
    )
    with caplog.at_level(logging.WARNING):
        (batch,) = islice(loader, 1)
    assert all(pixel(image) == list(RED) for image in batch.images)
    if workers == 0:  # a worker's log is its own
        assert {line.split()[1] for line in caplog.messages if "unreadable image" in line} == {
            f"{number}.jpg" for number in range(len(COUNTED))
        }


def peak_bytes(action: Callable[[], object]) -> int:
    """How far the process's resident memory rises while `action` runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def refuse(data: bytes) -> None:
    with pytest.raises(DataError):
        transform_image(data, "imagenet", 256)


@pytest.mark.parametrize("kind", [kind for kind in COUNTED if "bomb" in kind or "narrow" in kind])
def test_the_memory_of_a_bomb_is_bounded(kind: str) -> None:
    assert peak_bytes(lambda: refuse(COUNTED[kind])) < 2**25


def test_memory_is_measured() -> None:
    assert peak_bytes(lambda: decode_rgb(encoded(plain("RGB", RED, (4096, 4096))))) > 2**25


@pytest.mark.parametrize("size", [(10, 4000), (4000, 10), (1, 1), (3000, 2000)])
def test_odd_shapes_take_bounded_memory(size: tuple[int, int]) -> None:
    data = encoded(plain("RGB", RED, size))
    assert peak_bytes(lambda: transform_image(data, "imagenet", 256)) < 3 * 10**8


def test_deep_grey_is_rounded_to_the_nearest_level() -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = np.asarray(decode_rgb(encoded(Image.fromarray(levels))))[..., 0]
    assert np.array_equal(found, np.round(levels / 257).astype(np.uint8))
