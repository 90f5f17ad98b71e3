"""Pictures and networks that stand in for real ones where scores are tested."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor

from megarq.scoring.networks import FeatureNetwork
from megarq.scoring.weights import Weights


def write_pictures(folder: Path, count: int, seed: int, blur: float = 1.0, size: tuple[int, int] = (32, 32)) -> Path:
    """A folder of blurred noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        noise.filter(ImageFilter.GaussianBlur(blur * (0.5 + rng.random()))).save(folder / f"{number:03d}.png")
    return folder


def stand_in(name: str, layers: tuple[str, ...], dim: int = 6, sha256: str = "0" * 64) -> FeatureNetwork:
    """A network whose features are grey levels of a few pixels: [B, dim] for each layer."""

    def features(pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(pixels[:, :, 0, :dim].float().mean(1) / 255 for _ in layers)

    weights = Weights(name, Path("made-up.pth"))
    weights.__dict__["sha256"] = sha256  # as if it had been computed
    return FeatureNetwork(name, layers, features, weights, dim, "the first row")
