"""The scores, from features: through torch-fidelity's own functions wherever it has them.

X [N, dim] features of generated pictures, Y [M, dim] of real ones.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from megarq.errors import ConfigError, DataError
from megarq.scoring.statistics import Statistics

METRICS = ("fid", "is", "kid", "prc", "clip", "fd-dinov2")
"""As --metrics takes them."""
NEIGHBOURS = 3
"""Of precision and recall: as in the paper that proposed them, ADM's evaluator and torch-fidelity."""
EXTREMES = 16
"""Best and worst pictures by CLIP score that a result names."""
FEW = {"fid": 10_000, "rfid": 10_000, "fd-dinov2": 10_000, "is": 5_000, "kid": 1_000, "prc": 5_000, "clip": 1_000}
"""Fewer pictures than this get a warning.

FID's bias falls with 1/N: at 10,000 pictures it is still about a point. IS takes the entropy of N / splits pictures
over 1,000 classes. KID is unbiased, and clip a mean: there it is the spread. Precision and recall depend on N always.
"""
_DISTANCE_BYTES = 2**30
"""Of the distances that precision and recall hold at once."""


@dataclass(frozen=True)
class ScoreSettings:
    """What the scores depend on beside the features."""

    seed: int = 2020
    """Of everything random; torch-fidelity's."""
    is_splits: int = 10
    """Parts of which the Inception Score is the mean."""
    kid_subsets: int = 100
    """Draws over which KID is averaged."""
    kid_subset_size: int = 1000
    """Pictures in each draw; all, where there are fewer."""

    def check(self) -> None:
        """Raises: ConfigError for values that mean nothing."""
        least = {"seed": 0, "is_splits": 1, "kid_subsets": 1, "kid_subset_size": 2}
        for name, value in least.items():
            given = getattr(self, name)
            if given < value:
                raise ConfigError(f"--{name.replace('_', '-')} {given}: use {value} or more.")


def frechet(ours: Statistics, theirs: Statistics) -> float:
    """FID, or FD of another network: |mu - mu'|^2 + Tr(S + S' - 2 (S S')^(1/2)), in torch-fidelity's way."""
    same = ours.mu.dtype == theirs.mu.dtype and ours.sigma.dtype == theirs.sigma.dtype
    one, two = (
        {
            "mu": statistics.mu if same else statistics.mu.astype(np.float64),
            "sigma": statistics.sigma if same else statistics.sigma.astype(np.float64),
        }
        for statistics in (ours, theirs)
    )
    return float(fid_statistics_to_metric(one, two, False)[KEY_METRIC_FID])


def check_splits(settings: ScoreSettings, count: int) -> None:
    """Raises: ConfigError where some split of the Inception Score would have no picture."""
    if settings.is_splits > count:
        raise ConfigError(
            f"--is-splits {settings.is_splits} of {count} pictures: use at most one split for each picture."
        )


def inception_score(logits: Tensor, settings: ScoreSettings) -> dict[str, Any]:
    """exp of the mean KL divergence of p(y|x) from p(y), of logits [N, classes]: mean and deviation over splits."""
    scores = isc_features_to_metric(logits, settings.is_splits, True, settings.seed)
    return {
        "value": scores[KEY_METRIC_ISC_MEAN],
        "std": scores[KEY_METRIC_ISC_STD],
        "splits": settings.is_splits,
    }


def kid_subset_size(settings: ScoreSettings, ours: int, theirs: int) -> int:
    """Pictures in a draw, where there are so many. Raises: DataError for fewer than two."""
    size = min(settings.kid_subset_size, ours, theirs)
    if size < 2:
        raise DataError(f"KID of {ours} pictures and {theirs} in the reference: give at least 2 of each.")
    return size


def kernel_distance(ours: Tensor, theirs: Tensor, settings: ScoreSettings) -> dict[str, Any]:
    """KID: squared MMD with the kernel (x.y / dim + 1)^3, over draws of X and Y."""
    size = kid_subset_size(settings, len(ours), len(theirs))
    scores = kid_features_to_metric(
        ours, theirs, kid_subsets=settings.kid_subsets, kid_subset_size=size, rng_seed=settings.seed, verbose=False
    )
    return {
        "value": scores[KEY_METRIC_KID_MEAN],
        "std": scores[KEY_METRIC_KID_STD],
        "subsets": settings.kid_subsets,
        "subset_size": size,
    }


def precision_recall(ours: Tensor, theirs: Tensor, device: torch.device | str = "cpu") -> tuple[float, float]:
    """Share of X within the third-neighbour balls of Y, and of Y within those of X; distances are taken on `device`."""
    least = min(len(ours), len(theirs))
    if least <= NEIGHBOURS:
        raise DataError(
            f"precision and recall of {len(ours)} pictures and {len(theirs)} in the reference: give at least "
            f"{NEIGHBOURS + 1} of each."
        )
    rows = _DISTANCE_BYTES // (16 * max(len(ours), len(theirs)))  # floats, their copy, and their places as int64
    scores = prc_features_to_metric(
        *(ours.to(device), theirs.to(device)),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=max(1, min(10_000, rows)),
        save_cpu_ram=True,
        verbose=False,
    )
    return scores[KEY_METRIC_PRECISION], scores[KEY_METRIC_RECALL]


def clip_extremes(cosines: Tensor) -> dict[str, list[list[float | int]]]:
    """The pictures whose prompts fit best and worst: [index, cosine], the most extreme first."""
    order = torch.argsort(cosines, descending=True, stable=True).tolist()
    values = cosines.tolist()
    few = min(EXTREMES, len(order))
    return {
        "best": [[index, values[index]] for index in order[:few]],
        "worst": [[index, values[index]] for index in order[::-1][:few]],
    }


def too_few(metric: str, count: int | None, dim: int | None = None, whose: str = "") -> list[str]:
    """What to say where a count is too small for a metric; whose: `reference `, or nothing for the pictures scored."""
    if count is None:
        return []
    notes = []
    if count < FEW[metric]:
        notes.append(f"{metric}: {count} {whose}pictures are too few, use {FEW[metric]} or more.")
    if dim is not None and count <= dim:
        notes.append(f"{metric}: {count} {whose}pictures for {dim} dimensions leave the covariance singular.")
    return notes
