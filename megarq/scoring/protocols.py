"""Protocols of scoring: what is done to a picture before a network sees it, and how features become statistics.

All use the same files of weights. One protocol's numbers cannot be held against another's: the resize alone moves an
FID by more than models differ.

    uint8 [B, 3, H, W] --prepare--> float [B, 3, 299, 299] in about [-1, 1] --Inception's layers--> features
"""

import runpy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from megarq.errors import ConfigError

INCEPTION_SIDE = FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE
DINOV2_SIDE = 224
FEATURES = "2048"
"""Inception's layer behind FID, KID, precision and recall in every protocol."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2")
_MIXED = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")


@dataclass(frozen=True)
class Protocol:
    """How pictures become scores."""

    name: str
    """As --protocol takes it."""
    input: str
    """What the network is fed."""
    resize: str
    """From the pictures' size to that of its network; a result tells that of each metric's own."""
    normalize: str
    """From grey levels to the network's numbers."""
    statistics: str
    """From features to mean and covariance."""
    logits: str
    """The network's layer whose softmax gives the Inception Score."""
    extractor: str = ""
    """Inception's name in torch-fidelity's registry."""
    double: bool = True
    """Means are taken in float64; torch-fidelity averages in float32."""
    network: str = "inception"
    """Whose features all metrics but CLIP's and DINOv2's use."""

    def describe(self) -> dict[str, str]:
        """What a result says of it."""
        return {
            "name": self.name,
            "input": self.input,
            "resize": self.resize,
            "normalize": self.normalize,
            "statistics": self.statistics,
            "inception_score_layer": self.logits,
        }


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="rq-paper",
            input="float32 in [0, 1]",
            resize="bilinear to 299x299, half-pixel centres, no antialiasing (F.interpolate, align_corners=False)",
            normalize="2x - 1",
            statistics="mean and covariance in float64",
            logits="logits",
            extractor="megarq-rq-paper",
        ),
        Protocol(
            name="torch-fidelity",
            input="uint8",
            resize="bilinear to 299x299 as TensorFlow 1 has it: corner-aligned grid, no antialiasing",
            normalize="(x - 128) / 128",
            statistics="mean in float32, covariance in float64",
            logits="logits_unbiased",
            extractor="inception-v3-compat",
            double=False,
        ),
        Protocol(
            name="clean",
            input="uint8",
            resize="bicubic to 299x299, antialiased, each channel in float32, not rounded (Pillow)",
            normalize="(x - 128) / 128",
            statistics="mean and covariance in float64",
            logits="logits_unbiased",
            extractor="megarq-clean",
        ),
    )
}


def find_protocol(name: str) -> Protocol:
    """The protocol of that name, or the PROTOCOL of a Python file, which is run.

    Raises: ConfigError listing the names there are, or for a file without one.
    """
    if name.endswith(".py"):
        return _read_protocol(Path(name))
    if name not in PROTOCOLS:
        raise ConfigError(f"--protocol {name}: no such protocol. Use one of {', '.join(PROTOCOLS)}, or a file.py.")
    return PROTOCOLS[name]


def _read_protocol(path: Path) -> Protocol:
    if not path.is_file():
        raise ConfigError(f"--protocol {path}: no such file. Use one of {', '.join(PROTOCOLS)}, or another path.")
    found = runpy.run_path(str(path)).get("PROTOCOL")
    if not isinstance(found, Protocol):
        raise ConfigError(f"--protocol {path} defines no PROTOCOL. Write one, as tools/demo/digit_protocol.py has.")
    return found


def bilinear(pixels: Tensor, side: int) -> Tensor:
    """uint8, or float in [0, 1], [B, 3, H, W] -> float in [0, 1] [B, 3, side, side], as the paper's authors resize."""
    images = pixels if pixels.is_floating_point() else pixels.float() / 255
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


def tensorflow_bilinear(pixels: Tensor, side: int) -> Tensor:
    """uint8 [B, 3, H, W] -> float in [0, 255] [B, 3, side, side], as torch-fidelity resizes."""
    resized: Tensor = interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), size=(side, side), align_corners=False)
    return resized


def pillow_bicubic(pixels: Tensor, side: int) -> Tensor:
    """uint8 [B, 3, H, W] -> float around [0, 255], overshooting, [B, 3, side, side], as clean-fid resizes."""

    def resize(channel: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        image = Image.fromarray(channel.astype(np.float32))
        return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))

    channels = pixels.cpu().flatten(0, 1).numpy()
    with ThreadPoolExecutor(max(torch.get_num_threads(), 1)) as threads:
        resized = np.stack(list(threads.map(resize, channels)))
    return torch.from_numpy(resized).unflatten(0, pixels.shape[:2]).to(pixels.device)


class _Inception(FeatureExtractorInceptionV3):
    """torch-fidelity's network behind another resize. Its own forward takes nothing but its own resize."""

    @staticmethod
    def prepare(pixels: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] as the first layer takes them, [B, 3, 299, 299]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features [B, dim] of the layers asked for; of 2048, logits_unbiased and logits."""
        x = self.prepare(x)
        for name in (*_STEM, *(f"Mixed_{block}" for block in _MIXED), "AvgPool"):
            x = getattr(self, name)(x)
        features = {FEATURES: x.flatten(1)}
        if set(self.features_list) - {FEATURES}:
            features["logits_unbiased"] = features[FEATURES] @ self.fc.weight.T
            features["logits"] = features["logits_unbiased"] + self.fc.bias
        return tuple(features[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """The layers that forward gives."""
        return FEATURES, "logits_unbiased", "logits"


class RqPaperInception(_Inception):
    """As the authors of the paper feed it, through pytorch-fid's network."""

    @staticmethod
    def prepare(pixels: Tensor) -> Tensor:
        """uint8, or float in [0, 1] as the authors have it, [B, 3, H, W] -> [B, 3, 299, 299] in [-1, 1]."""
        return 2 * bilinear(pixels, INCEPTION_SIDE) - 1


class CleanInception(_Inception):
    """As clean-fid feeds it."""

    @staticmethod
    def prepare(pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> [B, 3, 299, 299] around [-1, 1]."""
        return (pillow_bicubic(pixels, INCEPTION_SIDE) - 128) / 128


class Resize(NamedTuple):
    """How pictures become those of a network's size."""

    told: str
    """What a result says of it."""
    apply: Callable[[Tensor], Tensor]
    """uint8 [B, 3, H, W] -> float in [0, 1] [B, 3, side, side]."""


_DINOV2 = {
    "rq-paper": Resize(
        "bilinear to 224x224, half-pixel centres, no antialiasing (F.interpolate, align_corners=False)",
        lambda pixels: bilinear(pixels, DINOV2_SIDE),
    ),
    "torch-fidelity": Resize(  # what its own DINOv2 does
        "bilinear to 224x224 as TensorFlow 1 has it: corner-aligned grid, no antialiasing",
        lambda pixels: tensorflow_bilinear(pixels, DINOV2_SIDE) / 255,
    ),
    "clean": Resize(  # what dgm-eval does with clean_resize
        "bicubic to 224x224, antialiased, each channel in float32, clipped to 0..255, not rounded (Pillow)",
        lambda pixels: pillow_bicubic(pixels, DINOV2_SIDE).clamp(0, 255) / 255,
    ),
}
"""By protocol, which has the same for Inception."""


def dinov2_resize(protocol: str) -> Resize:
    """DINOv2's resize under a protocol. Raises: ConfigError for a protocol that has none."""
    if protocol not in _DINOV2:
        raise ConfigError(
            f"fd-dinov2 under protocol {protocol}: only {', '.join(_DINOV2)} say how DINOv2 is fed. Use one of them, "
            "or leave fd-dinov2 out."
        )
    return _DINOV2[protocol]


def prepare_dinov2(protocol: str, pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] as DINOv2 takes them, [B, 3, 224, 224]. Raises: ConfigError as `dinov2_resize`."""
    images = dinov2_resize(protocol).apply(pixels)
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (_MEAN, _STD))
    return (images - mean) / std


for _name, _extractor in (("megarq-rq-paper", RqPaperInception), ("megarq-clean", CleanInception)):
    if _name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(_name, _extractor)
