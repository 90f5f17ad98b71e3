"""Small captioned pictures in tars, a small RQ-VAE for them, and what a folder holds."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megarq.config.models import RQVAEConfig
from megarq.rqvae.model import RQVAE


def small_rqvae(seed: int) -> RQVAE:
    """8x8 pictures to 4x4x3 codes of 32."""
    torch.manual_seed(seed)
    config = RQVAEConfig(
        resolution=8,
        channels=32,
        channel_multipliers=[1, 1],
        res_blocks=1,
        attention_resolutions=[],
        latent_channels=8,
        codebook_dim=8,
        codebook_size=32,
        depth=3,
    )
    model = RQVAE(config, seed=seed)
    with torch.no_grad():
        model.quant_conv.weight.mul_(3.0)
    return model.eval()


def picture(number: int, width: int = 10, height: int = 8, kind: str = "PNG") -> bytes:
    """Noise that the number decides, encoded."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def sample(number: int) -> dict[str, bytes]:
    """Members of a captioned picture with a class: k7.png, k7.txt, k7.cls."""
    members = {"png": picture(number), "txt": f"picture {number}".encode(), "cls": str(number % 3).encode()}
    return {f"k{number}.{extension}": data for extension, data in members.items()}


def write_tar(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]], mode: str = "w") -> None:
    """A tar of these members, or with mode "a" one more."""
    with tarfile.open(path, mode) as tar:
        for name, data in dict(members).items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_tars(folder: Path, counts: Iterable[int]) -> list[str]:
    """Tars of so many samples each, numbered through."""
    folder.mkdir(parents=True, exist_ok=True)
    first, paths = 0, []
    for shard, count in enumerate(counts):
        paths.append(folder / f"{shard:05d}.tar")
        numbers = range(first, first + count)
        write_tar(paths[-1], {name: data for number in numbers for name, data in sample(number).items()})
        first += count
    return list(map(str, paths))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
