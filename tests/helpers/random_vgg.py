"""VGG16's convolutions with random weights, in a file like torchvision's; its classifier, most of it, is left out."""

from pathlib import Path

import torch
import torchvision


def random_features() -> dict[str, torch.Tensor]:
    """The tensors, scaled so that activations neither vanish nor grow."""
    with torch.device("meta"):
        shapes = torchvision.models.vgg16(weights=None).features.state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        f"features.{name}": torch.randn(tensor.shape, generator=generator) * (2 / tensor[:1].numel()) ** 0.5
        for name, tensor in shapes.items()
    }


def write_vgg(folder: Path) -> Path:
    """Write the file."""
    path = folder / "vgg16-397923af.pth"
    torch.save(random_features(), path)
    return path
