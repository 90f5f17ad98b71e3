"""Intervals by the bootstrap: how much a score would move with other pictures of the same model.

The generated pictures are drawn again, with replacement; the reference stays. The interval is value +- 1.96 standard
deviations of the replicates, not their quantiles: a resample has some 63% distinct pictures, so its covariance is of
lower rank and its FID higher than the value throughout. The spread is right where the middle is not.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megarq.errors import ConfigError
from megarq.progress import progress_bar
from megarq.scoring.moments import Moments
from megarq.scoring.statistics import Statistics

NORMAL = 1.96
"""Standard deviations on either side of 95% of a normal distribution."""
_ROWS = 8192
"""Features converted to float64 at once."""


def check_replicates(replicates: int) -> None:
    """Raises: ConfigError for a number of replicates that has no deviation."""
    if replicates < 0 or replicates == 1:
        raise ConfigError(f"--bootstrap {replicates}: use 0 for no interval, or 2 or more resamples.")


def interval(value: float, replicates: list[float]) -> list[float]:
    """[low, high] around a value."""
    spread = NORMAL * float(np.std(replicates, ddof=1))
    return [value - spread, value + spread]


def resample(
    count: int, replicates: int, seed: int, score: Callable[[np.ndarray[Any, np.dtype[np.int64]]], float], name: str
) -> list[float]:
    """The score of each resample, given as the indices [count] drawn."""
    rng = np.random.default_rng(seed)
    return [score(rng.integers(count, size=count)) for _ in progress_bar(range(replicates), f"bootstrap of {name}")]


class FrechetReplicates:
    """Frechet distances of resamples to one reference.

    The root R of the reference's covariance S' is taken once: Tr (S S')^(1/2) is the sum of the roots of the
    eigenvalues of R S R, which is symmetric, so each replicate costs one product of features and one symmetric
    eigendecomposition. Features are centred on the mean of all, and go to float64 a part at a time.
    """

    def __init__(self, features: Tensor, reference: Statistics, device: torch.device) -> None:
        """features [N, dim] of the generated pictures."""
        self._features = features
        device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        self._centre = features.mean(0, dtype=torch.float64).to(device)
        self._mu = torch.from_numpy(reference.mu.astype(np.float64)).to(device)
        sigma = torch.from_numpy(reference.sigma.astype(np.float64)).to(device)
        values, vectors = torch.linalg.eigh(sigma)
        self._root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        self._trace = sigma.trace()

    def __call__(self, drawn: np.ndarray[Any, np.dtype[np.int64]]) -> float:
        """The distance where picture i stands in the sample as often as i is drawn."""
        times = torch.from_numpy(np.bincount(drawn, minlength=len(self._features)))
        moments = Moments(self._centre)
        for rows, weights in zip(self._features.split(_ROWS), times.split(_ROWS), strict=True):
            moments.add(rows, weights)
        sigma = moments.covariance
        eigenvalues = torch.linalg.eigvalsh(self._root @ sigma @ self._root)
        difference = moments.mean - self._mu
        traces = sigma.trace() + self._trace - 2 * eigenvalues.clamp_min(0).sqrt().sum()
        return float(difference.square().sum() + traces)
