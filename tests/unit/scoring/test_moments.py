"""Mean and covariance of batches, against those of all rows at once."""

import weakref

import numpy as np
import pytest
import torch
from scored_pictures import stand_in, write_pictures
from torch import Tensor

from megarq.data.pictures import open_pictures
from megarq.scoring.evaluate import make_reference
from megarq.scoring.features import extract
from megarq.scoring.moments import Moments
from megarq.scoring.networks import FeatureNetwork
from megarq.scoring.protocols import PROTOCOLS
from megarq.scoring.statistics import statistics_of, to_statistics

CPU = torch.device("cpu")
LAYER = ("inception", "2048")


def made_up(count: int, dim: int) -> Tensor:
    """Correlated features whose means, as Inception's, are about as large as their deviations, and some far larger."""
    rng = np.random.default_rng(0)
    mixed = rng.gamma(0.7, size=(count, dim)) @ rng.normal(size=(dim, dim)) / dim**0.5
    mixed[:, 0] += 1000
    return torch.from_numpy(mixed).float()


def summed(features: Tensor, batch: int) -> Moments:
    moments = Moments.shifted_by(features[:batch])
    for part in features.split(batch):
        moments.add(part)
    return moments


@pytest.mark.parametrize("batch", [1, 64, 1000])
def test_streamed_moments_are_those_of_all_rows(batch):
    features = made_up(1000, 100)
    rows, found = features.double().numpy(), summed(features, batch)
    expected = np.cov(rows, rowvar=False)
    assert found.count == 1000
    assert np.abs(found.mean.numpy() - rows.mean(0)).max() < 1e-10
    assert np.abs(found.covariance.numpy() - expected).max() < 1e-10 * np.trace(expected)


def test_rows_count_as_often_as_is_said():
    features = made_up(50, 6)
    times = torch.arange(50) % 4
    moments = Moments(features.double().mean(0))
    for part, often in zip(features.split(7), times.split(7), strict=True):
        moments.add(part, often)
    rows = features.double().repeat_interleave(times, 0).numpy()
    assert moments.count == len(rows)
    assert np.allclose(moments.mean, rows.mean(0), rtol=0, atol=1e-10)
    assert np.allclose(moments.covariance, np.cov(rows, rowvar=False), rtol=0, atol=1e-10)


class Watched:
    """Features of a stand-in, and which of its batches are still in memory."""

    def __init__(self) -> None:
        self.most = 0
        self._batches: list[weakref.ref[np.ndarray]] = []

    @property
    def alive(self) -> int:
        return sum(batch() is not None for batch in self._batches)

    def network(self) -> FeatureNetwork:
        plain = stand_in("inception", ("2048",))

        def features(pixels: Tensor) -> tuple[Tensor, ...]:
            self.most = max(self.most, self.alive)
            rows = plain.module(pixels)[0].numpy().copy()
            self._batches.append(weakref.ref(rows))
            return (torch.from_numpy(rows),)  # which keeps the array as long as there is a view of it

        return FeatureNetwork("inception", ("2048",), features, plain.weights, plain.dim, plain.resize)


@pytest.fixture
def pictures(tmp_path):
    """Thirty of 8x8."""
    return open_pictures(write_pictures(tmp_path / "thirty", 30, 0, size=(8, 8)))


def test_features_are_not_held_for_moments(pictures):
    watched = Watched()
    found = extract(pictures, [watched.network()], CPU, batch_size=4, summed=[LAYER])
    assert found.layers == {} and found.moments[LAYER].count == 30
    assert watched.most <= 1 and watched.alive == 0


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_a_reference_is_the_same_whether_its_features_are_kept_or_pass_by(pictures, protocol):
    networks = [stand_in("inception", ("2048",))]
    kept, passed = (
        make_reference(pictures, networks, PROTOCOLS[protocol], CPU, batch_size=4, keep=keep).networks["inception"]
        for keep in (["inception"], [])
    )
    assert kept.features is not None and passed.features is None
    assert np.array_equal(kept.mu, passed.mu) and np.array_equal(kept.sigma, passed.sigma)
    at_once = to_statistics(kept.features, PROTOCOLS[protocol])
    assert passed.mu.dtype == at_once.mu.dtype
    assert np.abs(passed.mu - at_once.mu).max() < 1e-12 and np.abs(passed.sigma - at_once.sigma).max() < 1e-12


def test_torch_fidelitys_mean_in_float32_is_of_the_features_themselves(pictures):
    found = extract(pictures, [stand_in("inception", ("2048",))], CPU, batch_size=4, hold=[LAYER])
    statistics = statistics_of(found, "inception", PROTOCOLS["torch-fidelity"])
    assert found.moments == {} and np.array_equal(statistics.mu, found.layers[LAYER].numpy().mean(0))
