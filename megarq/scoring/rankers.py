"""Rankers for rejection sampling: which of several drawn pictures are kept.

A ranker is called with pictures and what each was asked to show, and gives one score for each; higher is better.
Its network's packages are imported when it is made: drawing without ranking needs none of them.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from megarq.data.picture_set import Item
from megarq.errors import ConfigError
from megarq.scoring.weights import RANKER_WEIGHTS, find_weights

_log = logging.getLogger(__name__)
BATCH = 64
"""Pictures in one pass of a network."""
_WITHOUT = "leave ranking (--keep-fraction, --keep-best) out"

T = TypeVar("T")


class ClipRanker:
    """Cosine of picture and caption under CLIP ViT-B/32."""

    network = "clip"

    def __init__(self, weights: Path | None, device: torch.device) -> None:
        """weights: a file; by default one in a cache. Raises: CheckpointError for none, or one of something else."""
        from megarq.scoring.networks import Clip

        self._clip = Clip(find_weights("clip", weights, RANKER_WEIGHTS), device)
        _tell(self._clip.notes)

    @property
    def sha256(self) -> str:
        """Of the file of weights."""
        return self._clip.weights.sha256

    def __call__(self, pictures: Sequence[Image.Image], items: Sequence[Item]) -> list[float]:
        """Raises: ConfigError for an item without a caption."""
        scores: list[float] = []
        for first in range(0, len(pictures), BATCH):
            part, asked = pictures[first : first + BATCH], items[first : first + BATCH]
            prompts = [_given(item.prompt, "prompt") for item in asked]
            views = torch.stack([self._clip.view(picture.convert("RGB")) for picture in part])
            scores += self._clip.cosines(views, prompts).tolist()
        return scores


class ClassRanker:
    """Probability of the class under ResNet-101."""

    network = "resnet101"

    def __init__(self, weights: Path | None, device: torch.device, classes: int) -> None:
        """weights: a file; by default one in a cache. classes: how many the model has.

        Raises: CheckpointError for no file, or one of something else; ConfigError for one of other classes.
        """
        from megarq.scoring.networks import Classifier

        self._classifier = Classifier(find_weights("resnet101", weights, RANKER_WEIGHTS), device)
        if self._classifier.classes != classes:
            raise ConfigError(
                f"{RANKER_WEIGHTS} knows {self._classifier.classes} classes, the model has {classes}. Give the weights "
                f"of a ResNet-101 with the model's classes, or {_WITHOUT}."
            )
        _tell(self._classifier.notes)

    @property
    def sha256(self) -> str:
        """Of the file of weights."""
        return self._classifier.weights.sha256

    def __call__(self, pictures: Sequence[Image.Image], items: Sequence[Item]) -> list[float]:
        """Raises: ConfigError for an item without a class."""
        scores: list[float] = []
        for first in range(0, len(pictures), BATCH):
            labels = [_given(item.label, "class") for item in items[first : first + BATCH]]
            probabilities = self._classifier.probabilities(pictures[first : first + BATCH])
            scores += probabilities[range(len(labels)), labels].tolist()
        return scores


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        _log.warning("ranker: %s", note)


def _given(value: T | None, name: str) -> T:
    if value is None:
        raise ConfigError(f"a picture without a {name} cannot be ranked by it: {_WITHOUT}.")
    return value
