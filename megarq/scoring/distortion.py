"""How far pictures are from their reconstructions: one number for each pair of 8-bit pictures.

Shapes: B batch, R resolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WHITE = 255.0
WINDOW, SIGMA = 11, 1.5
"""Side and deviation of the Gaussian window of SSIM: those of its paper."""
_STABILITY = (0.01 * WHITE) ** 2, (0.03 * WHITE) ** 2
_AT_ONCE = 8
"""Pictures whose SSIM is computed together: in fp64, some 60 MB at 256x256."""


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference in grey levels, uint8 [B, 3, R, R] twice -> fp64 [B]; summed as integers, so exact."""
    squares = (x.int() - y.int()).square().flatten(1)
    return squares.sum(1).double() / squares.shape[1]


def least_error(resolution: int) -> float:
    """The squared error where one channel of one pixel differs by one grey level: no smaller one is possible but 0."""
    return 1 / (3 * resolution**2)


def psnr(errors: Tensor, resolution: int) -> Tensor:
    """Peak signal-to-noise ratio in dB, from squared errors [..].

    Equal pictures have an infinite one, with which no mean could be taken: they count as if they had the least error.
    """
    return 10 * torch.log10(WHITE**2 / errors.clamp_min(least_error(resolution)))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004), uint8 [B, 3, R, R] twice -> fp64 [B]; R at least WINDOW.

    The mean over channels, and over all places where the window lies within the picture, as the paper's code and
    scikit-image's `gaussian_weights=True, use_sample_covariance=False` have it.
    """
    return torch.cat([_ssim(*pair) for pair in zip(x.split(_AT_ONCE), y.split(_AT_ONCE), strict=True)])


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    window = torch.softmax(-offsets.square() / (2 * SIGMA**2), 0)

    def smooth(maps: Tensor) -> Tensor:
        planes = maps.flatten(0, 1).unsqueeze(1)  # [B * 3, 1, R, R]
        planes = F.conv2d(F.conv2d(planes, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return planes.unflatten(0, maps.shape[:2]).squeeze(2)

    x, y = x.double(), y.double()
    mean_x, mean_y = smooth(x), smooth(y)
    variance_x, variance_y = smooth(x * x) - mean_x * mean_x, smooth(y * y) - mean_y * mean_y
    covariance = smooth(x * y) - mean_x * mean_y
    light, contrast = _STABILITY
    similarity = (2 * mean_x * mean_y + light) * (2 * covariance + contrast)
    similarity = similarity / ((mean_x**2 + mean_y**2 + light) * (variance_x + variance_y + contrast))
    return similarity.flatten(1).mean(1)
