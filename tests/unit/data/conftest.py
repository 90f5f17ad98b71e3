"""Image tars and code shards, small and made up."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from flaky_server import FlakyServer
from PIL import Image

from megarq.data.code_shards import CodeShards
from megarq.data.code_writer import CodeBlock, write_shard
from megarq.data.manifest import CodeSettings, Manifest


def _png(number: int, size: int = 8) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def png() -> Callable[[int], bytes]:
    """A random 8x8 picture of a number."""
    return _png


@pytest.fixture
def server() -> Iterator[FlakyServer]:
    """An HTTP server on loopback that fails as it is told."""
    server = FlakyServer()
    yield server
    server.close()


@pytest.fixture
def make_tar(tmp_path: Path) -> Callable[[str, Mapping[str, bytes]], str]:
    """Write a tar of these members into the test's folder."""

    def make(name: str, members: Mapping[str, bytes]) -> str:
        path = tmp_path / name
        with tarfile.open(path, "w") as tar:
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return str(path)

    return make


@pytest.fixture
def image_tars(make_tar: Callable[[str, Mapping[str, bytes]], str]) -> list[str]:
    """Three tars of 10, 7 and 6 pictures with captions."""
    tars, number = [], 0
    for shard, count in enumerate((10, 7, 6)):
        members = {}
        for _ in range(count):
            members[f"s{number:03d}.png"] = _png(number)
            members[f"s{number:03d}.json"] = json.dumps({"captions": [f"picture {number}", f"no. {number}"]}).encode()
            number += 1
        tars.append(make_tar(f"{shard:05d}.tar", members))
    return tars


def settings(**changes: object) -> CodeSettings:
    """Settings of 2x2x3 codes from codebooks of 50, with two draws and latents."""
    values: dict[str, object] = {
        "code_shape": (2, 2, 3),
        "codebook_sizes": (50, 50, 50),
        "draws": 2,
        "temperature": 0.5,
        "latent_shape": (2, 2, 4),
        "fingerprint": "f" * 64,
        "transform": "center",
        "resolution": 8,
        "seed": 0,
        "batch_size": 16,
        "block_size": 1024,
    }
    return CodeSettings(**(values | changes))  # type: ignore[arg-type]


def code_block(first: int, count: int, ours: CodeSettings, *, captioned: bool, labelled: bool) -> CodeBlock:
    """Samples first .. first + count - 1: argmin codes are n mod 50, draw d's are (n + 10 d) mod 50."""
    numbers = np.arange(first, first + count)
    stack = np.broadcast_to(numbers[:, None, None, None], (count, *ours.code_shape))
    latents = None
    if ours.latent_shape is not None:
        latents = np.broadcast_to(numbers[:, None, None, None], (count, *ours.latent_shape)).astype(np.float16)
    return CodeBlock(
        codes=(stack % 50).astype(np.uint16),
        draws=[((stack + 10 * draw) % 50).astype(np.uint16) for draw in range(1, ours.draws + 1)],
        latents=latents,
        keys=[f"key{number}" for number in numbers],
        captions=[[f"first of {number}", f'"zweite" für\n{number}'] if captioned else [] for number in numbers],
        labels=[int(number) % 7 if labelled else None for number in numbers],
    )


@pytest.fixture
def make_codes(tmp_path: Path) -> Callable[..., CodeShards]:
    """Write code shards of given block sizes, `[[300, 20], [40]]` being two shards, and open them."""

    def make(
        shards: Sequence[Sequence[int]],
        name: str = "codes",
        captioned: bool = True,
        labelled: bool = True,
        **changes: object,
    ) -> CodeShards:
        ours, folder, first, records = settings(**changes), tmp_path / name, 0, []
        folder.mkdir()
        for index, sizes in enumerate(shards):
            blocks = []
            for size in sizes:
                blocks.append(code_block(first, size, ours, captioned=captioned, labelled=labelled))
                first += size
            records.append(write_shard(folder, index, ours, f"{index:05d}.tar", blocks))
        Manifest(ours, tuple(records)).save(folder)
        return CodeShards.open(folder)

    return make
