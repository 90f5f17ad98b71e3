"""What the demo's pictures are worth: a classifier trained on the real digits names them, and distances compare them.

All distances are Euclidean, between 32x32 grey pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.svm import SVC

Pictures = NDArray[np.float64]
"""[n, 32, 32] grey levels from 0 to 1."""


def grey(images: Sequence[Image.Image]) -> Pictures:
    """PIL images as grey levels."""
    return np.stack([np.asarray(image.convert("L"), dtype=np.float64) / 255 for image in images])


class DigitClassifier:
    """A support-vector machine on 8x8 means, trained on real digits alone."""

    def __init__(self, pictures: Pictures, digits: Sequence[int]) -> None:
        self._machine = SVC(C=10, gamma="scale").fit(self._features(pictures), list(digits))

    def accuracy(self, pictures: Pictures, digits: Sequence[int]) -> float:
        """Share of the pictures that show the digit they should."""
        return float(np.mean(self._machine.predict(self._features(pictures)) == np.asarray(digits)))

    @staticmethod
    def _features(pictures: Pictures) -> Pictures:
        return pictures.reshape(len(pictures), 8, 4, 8, 4).mean(axis=(2, 4)).reshape(len(pictures), 64)


@dataclass
class Comparison:
    """Prompted pictures against real ones."""

    prompt_accuracy: float
    """The classifier names the digit that was asked for."""
    shuffled_accuracy: float
    """The same against the prompts of other pictures: what chance gives."""
    real_accuracy: float
    """The classifier on held-out real digits."""
    distinct_images: int
    """Pictures that differ in at least one grey level."""
    diversity: float
    """Mean distance between pictures of one digit, divided by that of held-out real digits."""
    novelty: float
    """Median distance to the nearest training picture, divided by that of held-out real digits."""


def compare(
    drawn: tuple[Pictures, Sequence[int]],
    train: tuple[Pictures, Sequence[int]],
    held_out: tuple[Pictures, Sequence[int]],
) -> Comparison:
    """Judge drawn pictures (with the digits asked for) against real ones (with the digits they show)."""
    classifier = DigitClassifier(*train)
    asked = np.asarray(drawn[1])
    return Comparison(
        prompt_accuracy=classifier.accuracy(*drawn),
        shuffled_accuracy=classifier.accuracy(drawn[0], np.random.default_rng(0).permutation(asked).tolist()),
        real_accuracy=classifier.accuracy(*held_out),
        distinct_images=len({picture.tobytes() for picture in drawn[0]}),
        diversity=_spread(*drawn) / _spread(*held_out),
        novelty=_nearest(drawn[0], train[0]) / _nearest(held_out[0], train[0]),
    )


def _spread(pictures: Pictures, digits: Sequence[int]) -> float:
    """Mean over the digits of the mean distance between two pictures of one digit."""
    labels = np.asarray(digits)
    means = []
    for digit in np.unique(labels):
        own = _distances(pictures[labels == digit], pictures[labels == digit])
        means.append(own.sum() / (len(own) * (len(own) - 1)))
    return float(np.mean(means))


def _nearest(pictures: Pictures, others: Pictures) -> float:
    """Median distance to the nearest of the others."""
    return float(np.median(_distances(pictures, others).min(axis=1)))


def _distances(a: Pictures, b: Pictures) -> NDArray[np.float64]:
    flat_a, flat_b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    squares = (flat_a**2).sum(1)[:, None] + (flat_b**2).sum(1)[None] - 2 * flat_a @ flat_b.T
    return np.sqrt(np.maximum(squares, 0))
