"""Statistics of reference pictures on disk: ours, the paper's authors' (and pytorch-fid's, ADM's), torch-fidelity's.

    ours.npz      mu [2048], sigma [2048, 2048], features [N, 2048] (optional), megarq: JSON that says what they are;
                  of other networks than Inception: dinov2/mu, dinov2/sigma, dinov2/features, ..
    theirs.npz    mu, sigma; maybe acts [N, 2048]; nothing says what of
    NAME-inception-v3-compat-stat-fid-2048.pt       torch-fidelity's cache: {"mu", "sigma"}
    NAME-inception-v3-compat-features-2048.pt       a tensor [N, 2048]
Nothing in any of them is unpickled but tensors and numeric arrays.
"""

import json
import pickle
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy._core import multiarray
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from megarq.errors import DataError
from megarq.files import atomic_file, file_sha256
from megarq.scoring.features import Features
from megarq.scoring.networks import LAYERS
from megarq.scoring.protocols import Protocol

FORMAT, VERSION = "megarq-statistics", 1
SUFFIXES = (".npz", ".pt")
"""Of files that are statistics, not pictures."""
_EXTRACTORS = {"inception-v3-compat": "inception", "vgg16": "vgg16", "dinov2-vit-l-14": "dinov2"}
"""Names of torch-fidelity's networks that are ours."""
Floats = npt.NDArray[np.floating[Any]]


@dataclass
class Statistics:
    """What is known of the features of one network."""

    mu: Floats
    """[dim]."""
    sigma: Floats
    """[dim, dim]."""
    features: Tensor | None = None
    """[N, dim] float32, for KID, precision and recall."""
    weights: str | None = None
    """sha256 of the network's file, where it is known."""


@dataclass
class Reference:
    """What pictures are compared with."""

    kind: str
    """pictures or statistics."""
    path: str
    """As it was given."""
    sha256: str
    """Of the pictures' encoded bytes in order, or of the file of statistics."""
    count: int | None = None
    """Pictures, where it is known."""
    size: tuple[int, int] | None = None
    """(width, height) of the pictures, where it is known."""
    protocol: str | None = None
    """Where it is known."""
    transform: str | None = None
    """What brought the pictures to that size, where anything is known to have done it."""
    networks: dict[str | None, Statistics] = field(default_factory=dict)
    """By network; None where the file does not say of which."""
    notes: list[str] = field(default_factory=list)
    """What a result should say about it."""


def to_statistics(features: Tensor, protocol: Protocol, weights: str | None = None, keep: bool = True) -> Statistics:
    """Mean and covariance of features [N, dim], by torch-fidelity's function, in the protocol's precision."""
    given = fid_features_to_statistics(features.double() if protocol.double else features)
    return Statistics(given["mu"], given["sigma"], features if keep else None, weights)


def statistics_of(
    features: Features, network: str, protocol: Protocol, weights: str | None = None, keep: bool = False
) -> Statistics:
    """Mean and covariance of a network's layer, from its moments where these were taken, or else from its features.

    keep: the features too.
    """
    layer = (network, LAYERS[network])
    held = features.layers.get(layer)
    if layer not in features.moments:
        assert held is not None, "held where no moments are taken"
        return to_statistics(held, protocol, weights, keep)
    moments = features.moments[layer]
    mu, sigma = (values.cpu().numpy() for values in (moments.mean, moments.covariance))
    return Statistics(mu, sigma, held if keep else None, weights)


def write_statistics(path: Path, reference: Reference, features: bool) -> None:
    """Write statistics of known networks, whole or not at all; the features too where asked for."""
    arrays: dict[str, Any] = {}
    for name, statistics in reference.networks.items():
        prefix = "" if name == "inception" else f"{name}/"
        arrays |= {f"{prefix}mu": statistics.mu, f"{prefix}sigma": statistics.sigma}
        if features and statistics.features is not None:
            arrays[f"{prefix}features"] = statistics.features.numpy()
    says = {
        "format": FORMAT,
        "version": VERSION,
        "protocol": reference.protocol,
        "count": reference.count,
        "size": reference.size,
        "transform": reference.transform,
        "pictures_sha256": reference.sha256,
        "networks": {
            str(name): {"layer": LAYERS[str(name)], "weights_sha256": statistics.weights}
            for name, statistics in reference.networks.items()
        },
    }
    with atomic_file(path) as file:
        np.savez(file, megarq=np.array(json.dumps(says)), **arrays)


def read_statistics(path: Path) -> Reference:
    """Read a file of statistics of any known kind.

    Raises: DataError for a file that is missing, damaged, holds Python objects or no statistics, or is of a network
    that is not ours.
    """
    if not path.is_file():
        raise DataError(f"statistics {path}: no such file. Check the path, or make them with reference_stats.py.")
    reference = Reference("statistics", str(path), file_sha256(path))
    _read = _read_npz if path.suffix == ".npz" else _read_cache
    _read(path, reference)
    for statistics in reference.networks.values():
        dim = statistics.mu.shape[0] if statistics.mu.ndim == 1 else 0
        if statistics.sigma.shape != (dim, dim) or not np.isfinite(statistics.sigma.sum() + statistics.mu.sum()):
            raise DataError(
                f"{path}: mu {list(statistics.mu.shape)} and sigma {list(statistics.sigma.shape)} are "
                "no finite vector and square matrix of one size. Make the statistics again."
            )
    return reference


def _read_npz(path: Path, reference: Reference) -> None:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if _wanted(name)}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"statistics {path} cannot be read as numeric arrays ({error}). Copy the file again, or make it again."
        ) from error
    if "megarq" in arrays:
        _read_ours(path, arrays, reference)
        return
    if not {"mu", "sigma"} <= set(arrays):
        raise DataError(
            f"statistics {path} hold {', '.join(sorted(arrays)) or 'none of ours'}, not mu and sigma. Give another "
            "file, or make one with reference_stats.py."
        )
    features = torch.from_numpy(arrays["acts"]).float() if "acts" in arrays else None
    reference.networks[None] = Statistics(arrays["mu"], arrays["sigma"], features)
    reference.count = len(features) if features is not None else None
    reference.notes.append(_unnamed(path))


def _wanted(name: str) -> bool:
    return name.rpartition("/")[2] in ("mu", "sigma", "features", "acts", "megarq")


def _unnamed(path: Path) -> str:
    return (
        f"statistics {path.name} do not say which network, protocol and pictures they are of: "
        "that they fit was taken on trust."
    )


def _read_ours(path: Path, arrays: dict[str, Any], reference: Reference) -> None:
    try:
        says = json.loads(str(arrays["megarq"]))
        if (says["format"], says["version"]) != (FORMAT, VERSION):
            raise DataError(
                f"statistics {path} are {says['format']!r} of version {says['version']!r}, not {FORMAT!r} {VERSION}. "
                "Make them again with this version."
            )
        reference.protocol, reference.count = says["protocol"], says["count"]
        reference.size = (says["size"][0], says["size"][1])
        reference.transform = says.get("transform")  # which the first files did not say
        for name, record in says["networks"].items():
            prefix = "" if name == "inception" else f"{name}/"
            features = arrays.get(f"{prefix}features")
            reference.networks[name] = Statistics(
                arrays[f"{prefix}mu"],
                arrays[f"{prefix}sigma"],
                None if features is None else torch.from_numpy(features),
                record["weights_sha256"],
            )
    except (KeyError, TypeError, AttributeError, IndexError, json.JSONDecodeError) as error:
        raise DataError(f"statistics {path} lack {error}: they are damaged. Make them again.") from error


def _read_cache(path: Path, reference: Reference) -> None:
    """torch-fidelity's: the network stands in the file's name."""
    arrays: list[Any] = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in (np.float64, np.float32))]
    makers = [(multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals([*arrays, *makers]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"statistics {path} cannot be read as tensors and arrays ({reason}). Make torch-fidelity's cache again."
        ) from error
    if isinstance(loaded, Tensor) and loaded.ndim == 2 and len(loaded) > 1:
        given = fid_features_to_statistics(loaded)
        statistics = Statistics(given["mu"], given["sigma"], loaded.float())
        reference.count = len(loaded)
    elif isinstance(loaded, dict) and all(isinstance(loaded.get(name), np.ndarray) for name in ("mu", "sigma")):
        statistics = Statistics(loaded["mu"], loaded["sigma"])
    else:
        raise DataError(
            f"{path} holds a {type(loaded).__name__}, neither features nor mu and sigma. Give a file of "
            "torch-fidelity's cache, or make statistics with reference_stats.py."
        )
    network = _cached_network(path)
    if network:
        reference.protocol = "torch-fidelity"
        reference.notes.append(
            f"statistics {path.name} carry no protocol, weights or pictures: that they are of {network} as "
            "torch-fidelity feeds it was taken from the file's name."
        )
    else:
        reference.notes.append(_unnamed(path))
    reference.networks[network] = statistics


def _cached_network(path: Path) -> str | None:
    """Ours, of the network that a cache file is named after; None where it is named otherwise."""
    for extractor in FEATURE_EXTRACTORS_REGISTRY:
        for kind in ("stat-fid", "features"):
            _, found, layer = path.stem.rpartition(f"-{extractor}-{kind}-")
            if not found:
                continue
            ours = _EXTRACTORS.get(extractor)
            if ours is None or layer not in (LAYERS[ours], "dinov2"):
                raise DataError(
                    f"{path.name} is of layer {layer} of {extractor}, another network than those scored here. Give "
                    f"statistics of one of {', '.join(_EXTRACTORS)}."
                )
            return ours
    return None


def pick(reference: Reference, network: str, dim: int, protocol: Protocol, weights: str) -> Statistics:
    """The reference's statistics of a network, checked to be of the same kind as the features they meet.

    Raises: DataError for another network, protocol, file of weights or dimension.
    """
    statistics = reference.networks.get(network) or reference.networks.get(None)
    if statistics is None:
        known = ", ".join(map(str, reference.networks))
        raise DataError(
            f"statistics {reference.path} are of {known}, not of {network}. Give statistics of {network}, made with "
            f"reference_stats.py --networks {network}, or the pictures."
        )
    if reference.protocol not in (None, protocol.name):
        raise DataError(
            f"statistics {reference.path} were made under protocol {reference.protocol}, not {protocol.name}. Use "
            f"--protocol {reference.protocol}, or make them again."
        )
    if statistics.mu.shape[0] != dim:
        raise DataError(
            f"statistics {reference.path} have {statistics.mu.shape[0]} dimensions, the features of {network} {dim}: "
            f"they are of another network or layer. Give statistics of {network}'s layer {LAYERS[network]}."
        )
    if statistics.weights not in (None, weights):
        raise DataError(
            f"statistics {reference.path} were made with weights of {network} of sha256 "
            f"{str(statistics.weights)[:12]}.., not {weights[:12]}... Use one file for both, or make them again."
        )
    return statistics
