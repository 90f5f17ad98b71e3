import numpy as np
import pytest
import torch

from megarq.scoring.distortion import SIGMA, WINDOW, least_error, psnr, squared_error, ssim


def pair(count: int = 3, side: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, and the same with more of it."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, 3, side, side))
    y = np.clip(x + rng.normal(0, 40, x.shape), 0, 255)
    return torch.from_numpy(x.astype(np.uint8)), torch.from_numpy(y.astype(np.uint8))


def similarity(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of one channel, one place of the window after another."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    line = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights = np.outer(line, line) / line.sum() ** 2
    values = []
    for top in range(len(x) - WINDOW + 1):
        for left in range(len(x) - WINDOW + 1):
            a, b = (each[top : top + WINDOW, left : left + WINDOW].astype(np.float64) for each in (x, y))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            spread_a, spread_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            both = (weights * (a - mean_a) * (b - mean_b)).sum()
            light, contrast = 2.55**2, 7.65**2
            value = (2 * mean_a * mean_b + light) * (2 * both + contrast)
            values.append(value / ((mean_a**2 + mean_b**2 + light) * (spread_a + spread_b + contrast)))
    return float(np.mean(values))


def test_ssim_is_the_mean_over_all_places_of_the_window():
    x, y = pair()
    expected = [
        np.mean([similarity(*channels) for channels in zip(*images, strict=True)])
        for images in zip(x.numpy(), y.numpy(), strict=True)
    ]
    assert ssim(x, y).tolist() == pytest.approx(expected, abs=1e-12)


def test_ssim_of_a_picture_does_not_depend_on_its_batch():
    x, y = pair(19, 12)
    assert torch.equal(ssim(x, y)[17:], ssim(x[17:], y[17:]))


def test_ssim_of_equal_pictures_is_one_even_where_they_are_flat():
    flat = torch.full((1, 3, 11, 11), 200, dtype=torch.uint8)
    assert ssim(torch.cat([flat, pair(1, 11)[0]]), torch.cat([flat, pair(1, 11)[0]])).tolist() == [1.0, 1.0]


def test_psnr_is_that_of_the_squared_error():
    x, y = pair()
    errors = ((x.double() - y.double()) ** 2).mean((1, 2, 3))
    assert torch.equal(squared_error(x, y), errors)
    assert psnr(squared_error(x, y), 14).tolist() == pytest.approx(
        (20 * np.log10(255 / errors.sqrt().numpy())).tolist()
    )


def test_equal_pictures_count_as_if_one_level_differed():
    x = pair(1, 4)[0]
    y = x.clone()
    y[0, 0, 0, 0] ^= 1
    assert squared_error(x, y).item() == least_error(4)
    assert psnr(squared_error(x, x), 4) == psnr(squared_error(x, y), 4)
