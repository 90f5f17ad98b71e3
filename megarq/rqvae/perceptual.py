"""LPIPS, the perceptual loss: distances between VGG16's features, weighted as people judge (Zhang et al., 2018).

The `lpips` package has the network and the linear weights; VGG16's own come from a file that torchvision published:
the one that is given, or the one in torch's cache.
Shapes: B batch, R resolution.
"""

import pickle
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megarq.errors import ConfigError

VGG_FILE = "vgg16-397923af.pth"
_PUBLISHED = f"download.pytorch.org/models/{VGG_FILE}"
WITHOUT = "train without it by loss.perceptual_weight=0"
SMALLEST_RESOLUTION = 16
"""VGG16 halves the resolution four times."""


def find_vgg(given: str | Path | None = None, without: str = WITHOUT) -> Path:
    """The file with VGG16's weights: `given`, or the one in torch's cache.

    Raises ConfigError where it is missing, saying how to do `without`.
    """
    if find_spec("lpips") is None:
        raise ConfigError(f"LPIPS needs the lpips package, which is missing. Run pip install lpips, or {without}.")
    path = Path(given) if given is not None else Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
    if not path.is_file():
        where = "--perceptual-weights" if given is not None else "torch's cache"
        raise ConfigError(
            f"LPIPS needs VGG16's weights, {VGG_FILE}, but {path} ({where}) does not exist. Copy the file there from "
            f"{_PUBLISHED}, give it as --perceptual-weights FILE, or {without}."
        )
    return path


class LPIPS(nn.Module):
    """The mean perceptual distance of two batches of images; frozen, and always in evaluation mode."""

    def __init__(self, vgg: Path) -> None:
        """`vgg` is torchvision's file of VGG16. Raises ConfigError where it is another file."""
        super().__init__()
        self._network = _network(_read_vgg(vgg), vgg)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LPIPS":
        """Dropout before the linear weights stays off."""
        return super().train(False)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Two batches [B, 3, R, R] in [-1, 1] to an fp32 scalar."""
        return self.distances(reconstruction, images).mean()

    def distances(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Two batches [B, 3, R, R] in [-1, 1] to the distance of each pair, fp32 [B]."""
        distances: Tensor = self._network(reconstruction, images)
        return distances.float().flatten()


def _read_vgg(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): copy it again from {_PUBLISHED}.") from error
    return state if isinstance(state, dict) else {}


def _network(vgg: dict[str, Tensor], path: Path) -> nn.Module:
    """The package's network with both sets of weights.

    It is built without numbers: the package would make all of VGG16, whose unused classifier is nine tenths of it.
    """
    import lpips

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, about how the package asks for VGG16
        network: Any = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    network.scaling_layer = lpips.lpips.ScalingLayer()
    features: dict[str, Tensor] = {}
    for name, expected in network.net.state_dict().items():
        theirs = f"features.{name.partition('.')[2]}"
        found = vgg.get(theirs)
        if found is None or found.shape != expected.shape:
            raise ConfigError(
                f"{path} is not {VGG_FILE}: {theirs} is missing or has another shape. Use the file from {_PUBLISHED}."
            )
        features[name] = found.float()
    network.net.load_state_dict(features, assign=True)
    linear = torch.load(Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", map_location="cpu", weights_only=True)
    network.load_state_dict(linear, strict=False, assign=True)
    assert not any(tensor.is_meta for tensor in network.state_dict().values()), "the package has other names"
    return network
