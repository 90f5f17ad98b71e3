import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megarq.errors import DataError
from megarq.scoring.protocols import PROTOCOLS
from megarq.scoring.statistics import Reference, Statistics, pick, read_statistics, to_statistics, write_statistics

PAPER = PROTOCOLS["rq-paper"]


@pytest.fixture
def features() -> Tensor:
    """[9, 6]."""
    return torch.rand(9, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ours(tmp_path: Path, features: Tensor) -> Path:
    """Statistics of two networks, with the features."""
    reference = Reference("pictures", "real", "a" * 64, 9, (32, 32), "rq-paper")
    reference.networks["inception"] = to_statistics(features, PAPER, "b" * 64)
    reference.networks["dinov2"] = to_statistics(2 * features[:, :4], PAPER, "c" * 64)
    write_statistics(tmp_path / "ours.npz", reference, features=True)
    return tmp_path / "ours.npz"


def test_what_is_written_is_read(ours, features):
    found = read_statistics(ours)
    assert (found.kind, found.count, found.size, found.protocol) == ("statistics", 9, (32, 32), "rq-paper")
    assert found.notes == [] and set(found.networks) == {"inception", "dinov2"}
    inception = pick(found, "inception", 6, PAPER, "b" * 64)
    assert np.array_equal(inception.mu, features.double().numpy().mean(0))
    assert np.allclose(inception.sigma, np.cov(features.double().numpy().T), atol=1e-12)
    assert inception.features is not None and torch.equal(inception.features, features)
    assert pick(found, "dinov2", 4, PAPER, "c" * 64).mu.shape == (4,)


def test_other_programs_read_ours_as_mu_and_sigma(ours):
    with np.load(ours, allow_pickle=False) as file:
        assert file["mu"].shape == (6,) and file["sigma"].shape == (6, 6)
        says = json.loads(str(file["megarq"]))
    assert (says["format"], says["version"], says["pictures_sha256"]) == ("megarq-statistics", 1, "a" * 64)
    assert says["networks"]["inception"] == {"layer": "2048", "weights_sha256": "b" * 64}


def test_features_are_left_out_unless_asked_for(tmp_path, features):
    reference = Reference("pictures", "real", "a" * 64, 9, (32, 32), "rq-paper")
    reference.networks["inception"] = to_statistics(features, PAPER, "b" * 64)
    write_statistics(tmp_path / "small.npz", reference, features=False)
    assert read_statistics(tmp_path / "small.npz").networks["inception"].features is None


@pytest.mark.parametrize("extra", [{}, {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}])
def test_the_authors_npz_is_taken_on_trust_with_a_note(tmp_path, features, extra):
    """pytorch-fid, the paper's authors and ADM's evaluator write mu and sigma; ADM's more."""
    values = features.numpy()
    np.savez(tmp_path / "coco_256_val.npz", mu=values.mean(0), sigma=np.cov(values, rowvar=False), **extra)
    found = read_statistics(tmp_path / "coco_256_val.npz")
    assert found.notes == [
        "statistics coco_256_val.npz do not say which network, protocol and pictures they are of: "
        "that they fit was taken on trust."
    ]
    for protocol in PROTOCOLS.values():
        assert np.array_equal(pick(found, "inception", 6, protocol, "any").mu, values.mean(0))


def test_the_authors_activations_are_features(tmp_path, features):
    values = features.numpy()
    np.savez(tmp_path / "acts.npz", acts=values, mu=values.mean(0), sigma=np.cov(values, rowvar=False))
    found = read_statistics(tmp_path / "acts.npz")
    assert found.count == 9 and torch.equal(found.networks[None].features, features)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("vgg16", 6, PAPER, "b" * 64), "are of inception, dinov2, not of vgg16. Give statistics of vgg16, made with"),
        (
            ("inception", 6, PROTOCOLS["clean"], "b" * 64),
            "were made under protocol rq-paper, not clean. Use --protocol",
        ),
        (
            ("inception", 2048, PAPER, "b" * 64),
            "have 6 dimensions, the features of inception 2048: they are of another",
        ),
        (
            ("inception", 6, PAPER, "d" * 64),
            "were made with weights of inception of sha256 bbbbbbbbbbbb.., not dddddddd",
        ),
    ],
)
def test_statistics_of_another_kind_are_refused(ours, asked, message):
    with pytest.raises(DataError, match=message):
        pick(read_statistics(ours), *asked)


def damage(path: Path, kind: str) -> None:
    arrays: dict[str, object] = {"mu": np.zeros(3), "sigma": np.eye(3)}
    if kind == "torn":
        np.savez(path, **arrays)
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "objects":
        np.savez(path, mu=np.array([print], dtype=object), sigma=np.eye(3))
    elif kind == "other":
        np.savez(path, arr_0=np.zeros((2, 3)))
    elif kind == "shapes":
        np.savez(path, mu=np.zeros(3), sigma=np.eye(4))
    elif kind == "infinite":
        np.savez(path, mu=np.full(3, np.nan), sigma=np.eye(3))
    elif kind == "version":
        np.savez(path, megarq=np.array(json.dumps({"format": "megarq-statistics", "version": 9})), **arrays)
    elif kind == "incomplete":
        np.savez(path, megarq=np.array(json.dumps({"format": "megarq-statistics", "version": 1})), **arrays)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "x.npz: no such file. Check the path, or make them with reference_stats.py."),
        ("torn", "cannot be read as numeric arrays"),
        ("objects", "cannot be read as numeric arrays .*allow_pickle"),
        ("other", "hold none of ours, not mu and sigma. Give another file"),
        ("shapes", r"mu \[3\] and sigma \[4, 4\] are no finite vector and square matrix"),
        ("infinite", r"mu \[3\] and sigma \[3, 3\] are no finite vector"),
        ("version", "are 'megarq-statistics' of version 9, not 'megarq-statistics' 1. Make them again"),
        ("incomplete", "lack 'protocol': they are damaged. Make them again."),
    ],
)
def test_a_file_that_is_no_statistics_is_refused(tmp_path, kind, message):
    damage(tmp_path / "x.npz", kind)
    with pytest.raises(DataError, match=message):
        read_statistics(tmp_path / "x.npz")


def test_torch_fidelitys_cache_is_read(theirs):
    statistics = read_statistics(theirs.cache / "real-inception-v3-compat-stat-fid-2048.pt")
    features = read_statistics(theirs.cache / "real-inception-v3-compat-features-2048.pt")
    assert statistics.protocol == features.protocol == "torch-fidelity"
    for found in (statistics, features):
        assert (
            len(found.notes) == 1
            and "carry no protocol, weights or pictures: that they are of inception" in found.notes[0]
        )
    one, two = (found.networks["inception"] for found in (statistics, features))
    assert np.array_equal(one.mu, two.mu) and np.array_equal(one.sigma, two.sigma)
    assert one.features is None and two.features is not None and features.count == len(two.features)
    with pytest.raises(DataError, match="were made under protocol torch-fidelity, not clean"):
        pick(statistics, "inception", 2048, PROTOCOLS["clean"], "any")


def test_a_cache_of_another_network_is_refused(tmp_path, features):
    torch.save(features, tmp_path / "coco-clip-vit-b-32-features-clip.pt")
    with pytest.raises(DataError, match="is of layer clip of clip-vit-b-32, another network than those scored here"):
        read_statistics(tmp_path / "coco-clip-vit-b-32-features-clip.pt")
    torch.save(features, tmp_path / "coco-inception-v3-compat-features-768.pt")
    with pytest.raises(DataError, match="is of layer 768 of inception-v3-compat, another"):
        read_statistics(tmp_path / "coco-inception-v3-compat-features-768.pt")


def test_a_renamed_cache_is_taken_with_a_note(tmp_path, features):
    torch.save(features, tmp_path / "mine.pt")
    found = read_statistics(tmp_path / "mine.pt")
    assert found.protocol is None and len(found.notes) == 1 and list(found.networks) == [None]


class Opened:
    """Its unpickling would run code."""

    def __reduce__(self):
        return (print, ("code ran",))


def test_code_in_a_cache_is_not_run(tmp_path, capfd):
    torch.save({"mu": Opened(), "sigma": np.eye(2)}, tmp_path / "a.pt")
    with pytest.raises(DataError, match="cannot be read as tensors and arrays .*Make torch-fidelity's cache again"):
        read_statistics(tmp_path / "a.pt")
    torch.save([1], tmp_path / "b.pt")
    with pytest.raises(DataError, match="holds a list, neither features nor mu and sigma. Give a file"):
        read_statistics(tmp_path / "b.pt")
    assert "code ran" not in capfd.readouterr().out


def test_statistics_are_of_unknown_weights_where_nothing_says(features):
    assert Statistics(np.zeros(2), np.eye(2)).weights is None and to_statistics(features, PAPER).weights is None
