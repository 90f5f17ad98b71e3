"""Each score against a formula written out."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from megarq.errors import ConfigError, DataError
from megarq.scoring import scores
from megarq.scoring.bootstrap import FrechetReplicates, check_replicates, interval, resample
from megarq.scoring.protocols import PROTOCOLS
from megarq.scoring.scores import ScoreSettings
from megarq.scoring.statistics import Statistics, to_statistics

CPU = torch.device("cpu")


def made_up(count: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated features, not normal, of order one."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dim, dim)) / math.sqrt(dim)
    mixed = rng.gamma(2.0, size=(count, dim)) @ mixing
    return torch.from_numpy(mixed + shift).float()


def frechet_by_scipy(ours: np.ndarray, theirs: np.ndarray) -> float:
    """From the definition, in float64, with the root of the product that scipy finds."""
    means, covariances = [], []
    for features in (ours, theirs):
        mean = features.sum(0) / len(features)
        centred = features - mean
        means.append(mean)
        covariances.append(centred.T @ centred / (len(features) - 1))
    root = sqrtm(covariances[0] @ covariances[1])
    difference = means[0] - means[1]
    return float(difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root.real))


@pytest.mark.parametrize(("count", "dim"), [(400, 24), (900, 200)])
@pytest.mark.parametrize("protocol", ["rq-paper", "clean"])
def test_fid_in_float64_is_that_of_scipys_root(protocol, count, dim):
    ours, theirs = made_up(count, dim, 0), made_up(count + 100, dim, 1, shift=0.1)
    found = scores.frechet(*(to_statistics(features, PROTOCOLS[protocol]) for features in (ours, theirs)))
    assert found == pytest.approx(frechet_by_scipy(ours.double().numpy(), theirs.double().numpy()), abs=1e-6)


def test_fid_under_torch_fidelity_averages_in_float32():
    ours = made_up(400, 24, 0)
    statistics = to_statistics(ours, PROTOCOLS["torch-fidelity"])
    assert statistics.mu.dtype == np.float32 and np.array_equal(statistics.mu, ours.numpy().mean(0))
    double = to_statistics(ours, PROTOCOLS["rq-paper"])
    assert double.mu.dtype == np.float64
    assert scores.frechet(statistics, double) == pytest.approx(0, abs=1e-6)


def test_inception_score_is_the_mean_exponential_of_the_divergences():
    logits = made_up(50, 7, 2).mul(3)
    order = np.random.RandomState(2020).permutation(50)
    expected = []
    for part in range(4):
        chosen = logits.double().numpy()[order[part * 50 // 4 : (part + 1) * 50 // 4]]
        shares = np.exp(chosen) / np.exp(chosen).sum(1, keepdims=True)
        expected.append(math.exp(np.mean([sum(p * np.log(p / shares.mean(0))) for p in shares])))
    found = scores.inception_score(logits, ScoreSettings(is_splits=4))
    assert found["value"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert found["std"] == pytest.approx(np.std(expected), abs=1e-9)


def test_kid_of_all_pictures_is_the_double_loop():
    ours, theirs = made_up(20, 5, 3), made_up(20, 5, 4, shift=0.3)
    found = scores.kernel_distance(ours, theirs, ScoreSettings(kid_subsets=3))
    assert (found["subset_size"], found["subsets"]) == (20, 3)

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x.double() @ y.double() / 5 + 1) ** 3)

    within = [
        sum(kernel(x[i], x[j]) for i in range(20) for j in range(20) if i != j) / (20 * 19) for x in (ours, theirs)
    ]
    between = sum(kernel(x, y) for x in ours for y in theirs) / 400
    assert found["value"] == pytest.approx(sum(within) - 2 * between, rel=1e-4, abs=1e-4)
    assert found["std"] == pytest.approx(0, abs=1e-4)


def test_precision_and_recall_are_the_plain_loop():
    ours, theirs = made_up(30, 4, 5), made_up(25, 4, 6, shift=0.6)

    def share_within(points: Tensor, centres: Tensor) -> float:
        inside = 0
        radii = [sorted(float((c - other).norm()) for other in centres)[3] for c in centres]  # the first is itself
        for point in points:
            inside += any(float((point - c).norm()) <= r for c, r in zip(centres, radii, strict=True))
        return inside / len(points)

    precision, recall = scores.precision_recall(ours, theirs)
    assert precision == pytest.approx(share_within(ours, theirs), abs=1e-6)
    assert recall == pytest.approx(share_within(theirs, ours), abs=1e-6)
    assert 0 < precision < 1 and 0 < recall < 1


def test_precision_and_recall_do_not_depend_on_the_part_held_at_once(monkeypatch):
    ours, theirs = made_up(30, 4, 5), made_up(25, 4, 6, shift=0.6)
    whole = scores.precision_recall(ours, theirs)
    monkeypatch.setattr(scores, "_DISTANCE_BYTES", 16 * 30 * 7)
    assert scores.precision_recall(ours, theirs) == pytest.approx(whole, abs=1e-6)


def test_the_best_and_the_worst_by_clip_are_listed_from_the_extreme_on():
    cosines = torch.tensor([0.25, 0.5, -0.125, 0.25])
    found = scores.clip_extremes(cosines)
    assert found["best"] == [[1, 0.5], [0, 0.25], [3, 0.25], [2, -0.125]]
    assert found["worst"] == [[2, -0.125], [3, 0.25], [0, 0.25], [1, 0.5]]
    assert len(scores.clip_extremes(torch.rand(40))["best"]) == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_splits": 0}, "--is-splits 0: use 1 or more."),
        ({"kid_subsets": 0}, "--kid-subsets 0: use 1 or more."),
        ({"kid_subset_size": 1}, "--kid-subset-size 1: use 2 or more."),
        ({"seed": -1}, "--seed -1: use 0 or more."),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ScoreSettings(**settings).check()


def test_too_few_pictures_for_a_score_are_refused():
    with pytest.raises(ConfigError, match="--is-splits 10 of 3 pictures: use at most one split"):
        scores.check_splits(ScoreSettings(), 3)
    with pytest.raises(DataError, match="KID of 1 pictures and 5 in the reference: give at least 2"):
        scores.kernel_distance(torch.zeros(1, 2), torch.zeros(5, 2), ScoreSettings())
    with pytest.raises(DataError, match="precision and recall of 3 pictures and 9 in the reference: give at least 4"):
        scores.precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))


def test_few_pictures_for_a_metric_are_told():
    assert scores.too_few("fid", 50_000, 2048) == [] and scores.too_few("fid", None, 2048) == []
    assert scores.too_few("fid", 2048, 2048, "reference ") == [
        "fid: 2048 reference pictures are too few, use 10000 or more.",
        "fid: 2048 reference pictures for 2048 dimensions leave the covariance singular.",
    ]
    assert scores.too_few("is", 4999) == ["is: 4999 pictures are too few, use 5000 or more."]


def test_a_replicate_is_the_fid_of_the_pictures_drawn():
    ours, theirs = made_up(60, 8, 6), made_up(80, 8, 7)
    reference = to_statistics(theirs, PROTOCOLS["rq-paper"])
    replicate = FrechetReplicates(ours, reference, CPU)
    drawn = np.random.default_rng(0).integers(60, size=60)
    expected = frechet_by_scipy(ours.double().numpy()[drawn], theirs.double().numpy())
    assert replicate(drawn) == pytest.approx(expected, abs=1e-8)
    everyone = scores.frechet(to_statistics(ours, PROTOCOLS["rq-paper"]), reference)
    assert replicate(np.arange(60)) == pytest.approx(everyone, abs=1e-8)


def test_a_replicate_of_a_singular_reference_is_finite():
    reference = Statistics(np.zeros(6), np.diag([1.0, 2, 0, 0, 0, -1e-18]))
    replicate = FrechetReplicates(made_up(5, 6, 8), reference, CPU)
    assert np.isfinite(replicate(np.arange(5)))


def test_the_spread_of_replicates_is_that_of_other_samples():
    """The deviation of a mean over n is known; the bootstrap finds it."""
    values = torch.from_numpy(np.random.default_rng(9).normal(size=400))
    found = resample(400, 300, 2020, lambda drawn: float(values[torch.from_numpy(drawn)].mean()), "clip")
    assert np.std(found) == pytest.approx(float(values.std()) / 20, rel=0.15)
    low, high = interval(1.0, found)
    assert (low + high) / 2 == pytest.approx(1.0) and high - low == pytest.approx(2 * 1.96 * np.std(found, ddof=1))
    assert found == resample(400, 300, 2020, lambda drawn: float(values[torch.from_numpy(drawn)].mean()), "clip")


@pytest.mark.parametrize("replicates", [-1, 1])
def test_replicates_without_deviation_are_refused(replicates):
    with pytest.raises(ConfigError, match=f"--bootstrap {replicates}: use 0 for no interval, or 2 or more"):
        check_replicates(replicates)
