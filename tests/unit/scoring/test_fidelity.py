"""The real Inception with random weights, against torch-fidelity's own command line on the same folders."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megarq.scoring.evaluate import Request, evaluate
from megarq.scoring.protocols import PROTOCOLS
from megarq.scoring.result import to_result, to_table
from megarq.scoring.scores import ScoreSettings

CPU = torch.device("cpu")
SETTINGS = ScoreSettings(is_splits=3, kid_subset_size=5, kid_subsets=5)


@pytest.fixture(scope="module")
def ours(generated: Path, real: Path, inception_file: Path):
    """All that torch-fidelity has, under its protocol."""
    return evaluate(
        Request(
            str(generated),
            str(real),
            PROTOCOLS["torch-fidelity"],
            ("fid", "is", "kid", "prc"),
            CPU,
            {"inception": inception_file},
            SETTINGS,
        )
    )


def test_scores_equal_those_of_torch_fidelitys_command_line(ours, theirs):
    expected = {
        "fid": theirs.scores["frechet_inception_distance"],
        "is": theirs.scores["inception_score_mean"],
        "kid": theirs.scores["kernel_inception_distance_mean"],
        "precision": theirs.scores["precision"],
        "recall": theirs.scores["recall"],
    }
    assert {name: score["value"] for name, score in ours.metrics.items()} == pytest.approx(expected, abs=1e-6)
    assert ours.metrics["is"]["std"] == pytest.approx(theirs.scores["inception_score_std"], abs=1e-6)
    assert ours.metrics["kid"]["std"] == pytest.approx(theirs.scores["kernel_inception_distance_std"], abs=1e-6)
    assert expected["fid"] > 1 and expected["kid"] > 1e-3 and expected["is"] > 1.02


def test_the_inception_score_of_biased_logits_is_another(ours, generated, inception_file):
    biased = evaluate(
        Request(*(str(generated), None, PROTOCOLS["rq-paper"], ("is",), CPU), {"inception": inception_file}, SETTINGS)
    )
    assert (biased.metrics["is"]["layer"], ours.metrics["is"]["layer"]) == ("logits", "logits_unbiased")
    assert abs(biased.metrics["is"]["value"] - ours.metrics["is"]["value"]) > 1e-3


def test_torch_fidelitys_cache_gives_the_scores_that_the_pictures_give(ours, theirs):
    reference = ours.reference.networks["inception"]
    cached = torch.load(theirs.cache / "real-inception-v3-compat-features-2048.pt")
    assert torch.equal(reference.features, cached)
    statistics = torch.load(theirs.cache / "real-inception-v3-compat-stat-fid-2048.pt", weights_only=False)
    assert np.array_equal(reference.mu, statistics["mu"]) and np.array_equal(reference.sigma, statistics["sigma"])


def test_the_result_holds_all_that_the_scores_depend_on(ours, inception_file):
    result = json.loads(json.dumps(to_result(ours)))
    assert set(result["metrics"]) == {"fid", "is", "kid", "precision", "recall"}
    assert result["protocol"]["name"] == "torch-fidelity" and result["resize"].startswith("bilinear to 299x299 as Tens")
    assert (result["count"], result["scored_seed"], result["images"]["size"]) == (6, 2020, [32, 32])
    assert set(result["weights_sha256"]) == {"inception"} and len(result["weights_sha256"]["inception"]) == 64
    assert result["reference"]["kind"] == "pictures" and result["reference"]["count"] == 6
    assert result["metrics"]["kid"]["subset_size"] == 5 and result["metrics"]["is"]["splits"] == 3
    table = to_table(result)
    for told in ("torch-fidelity", result["reference_sha256"][:12], result["weights_sha256"]["inception"][:12]):
        assert told in table


def test_rq_paper_is_the_distance_of_its_features_in_float64(ours, generated, real, inception_file):
    """Of six pictures in 2,048 dimensions, Tr (S S')^(1/2) is the nuclear norm of X Y^T / 5.

    The roots of some 2,000 eigenvalues that should be zero leave more than float64's rounding: hence the tolerance.
    """
    found = evaluate(
        Request(
            *(str(generated), str(real), PROTOCOLS["rq-paper"], ("fid", "kid"), CPU),
            {"inception": inception_file},
            SETTINGS,
        )
    )
    seen = [found.features.layers["inception", "2048"], found.reference.networks["inception"].features]
    means = [features.double().numpy().mean(0) for features in seen]
    centred = [features.double().numpy() - mean for features, mean in zip(seen, means, strict=True)]
    traces = sum((part**2).sum() / (len(part) - 1) for part in centred)
    shared = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum() / 5
    expected = ((means[0] - means[1]) ** 2).sum() + traces - 2 * shared
    assert found.metrics["fid"]["value"] == pytest.approx(expected, abs=1e-5 * traces)
    assert abs(found.metrics["fid"]["value"] - ours.metrics["fid"]["value"]) > 1e-3, "another protocol, another score"
