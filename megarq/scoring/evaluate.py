"""From pictures and a reference to the result: which networks are needed, one pass over each list, the scores."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megarq.data.pictures import Pictures, decode_plain, open_pictures
from megarq.errors import ConfigError, DataError
from megarq.scoring import scores
from megarq.scoring.bootstrap import NORMAL, FrechetReplicates, check_replicates, interval, resample
from megarq.scoring.features import Features, Layer, extract, no_prompt, other_size
from megarq.scoring.networks import LAYERS, Clip, FeatureNetwork, build_network
from megarq.scoring.protocols import Protocol
from megarq.scoring.scores import METRICS, ScoreSettings, too_few
from megarq.scoring.statistics import SUFFIXES, Reference, Statistics, pick, read_statistics, statistics_of
from megarq.scoring.weights import find_weights

AGAINST_REFERENCE = ("fid", "kid", "prc", "fd-dinov2")
"""Metrics that compare pictures with a reference."""
FRECHET = ("fid", "fd-dinov2")
"""Metrics of which mean and covariance are enough."""
REFERENCE_TRANSFORMS = ("none", "center", "squeeze")
"""What may be done to a reference's pictures; none: they have the size that is asked for."""
PRC_NETWORKS = ("inception", "vgg16")
"""Whose features precision and recall may use."""


@dataclass(frozen=True)
class Request:
    """What is to be scored, and how."""

    images: str
    """Folder, shards or picture set."""
    reference: str | None
    """The same, or a file of statistics; may be left out for metrics that need none."""
    protocol: Protocol
    """How pictures become scores."""
    metrics: tuple[str, ...]
    """Names in METRICS."""
    device: torch.device
    """Where the networks run."""
    weights: dict[str, Path] = field(default_factory=dict)
    """Files of the networks; those left out are looked for in caches."""
    settings: ScoreSettings = field(default_factory=ScoreSettings)
    """What the scores depend on beside the features."""
    prc_network: str | None = None
    """Whose features precision and recall use; by default the protocol's network's."""
    bootstrap: int = 0
    """Resamples for intervals; 0 for none."""
    batch_size: int = 64
    """Pictures in one pass of the networks."""
    reference_transform: str = "none"
    """A name in REFERENCE_TRANSFORMS: brings the reference's pictures to the size of those scored."""
    workers: int | None = None
    """Threads that decode pictures; by default one for each core, 16 at most."""

    def check(self) -> None:
        """Raises: ConfigError for what cannot be asked."""
        self.settings.check()
        check_replicates(self.bootstrap)
        for metric in self.metrics:
            if metric not in METRICS:
                raise ConfigError(f"--metrics {metric}: no such metric. Known: {', '.join(METRICS)}.")
        if not self.metrics:
            raise ConfigError(f"--metrics is empty. Name some of {', '.join(METRICS)}.")
        against = [metric for metric in self.metrics if metric in AGAINST_REFERENCE]
        if against and self.reference is None:
            raise ConfigError(
                f"no REFERENCE, which {', '.join(against)} need. Give one after IMAGES: pictures or statistics."
            )
        if self.prc_network not in (None, *PRC_NETWORKS):
            raise ConfigError(f"--prc-network {self.prc_network}: use one of {', '.join(PRC_NETWORKS)}.")
        if self.reference_transform not in REFERENCE_TRANSFORMS:
            known = ", ".join(REFERENCE_TRANSFORMS)
            raise ConfigError(f"--reference-transform {self.reference_transform}: use one of {known}.")
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size {self.batch_size}: use 1 or more.")
        used = {self.network_of(metric) for metric in self.metrics}
        unused, wanting = sorted(self.weights.keys() - used), sorted(used - self.weights.keys())
        if unused and wanting:
            raise ConfigError(
                f"--feature-weights gives {self.weights[unused[0]]} for {unused[0]}, which --metrics "
                f"{','.join(self.metrics)} does not use. Give {wanting[0]}=FILE, or leave it out."
            )

    def network_of(self, metric: str) -> str:
        """Whose features a metric uses."""
        ours = self.protocol.network
        return {"fd-dinov2": "dinov2", "prc": self.prc_network or ours, "clip": "clip"}.get(metric, ours)

    def layers(self) -> dict[str, list[str]]:
        """The layers that are needed of each feature network."""
        needed: dict[str, list[str]] = {}
        for metric in self.metrics:
            network = self.network_of(metric)
            if network != "clip":
                layer = self.protocol.logits if metric == "is" else LAYERS[network]
                layers = needed.setdefault(network, [])
                if layer not in layers:
                    layers.append(layer)
        return {network: sorted(layers) for network, layers in needed.items()}

    def held(self) -> frozenset[Layer]:
        """The layers whose features are held: all that is not of Frechet distances alone, and all for resamples."""
        return frozenset(
            (self.network_of(metric), self.protocol.logits if metric == "is" else LAYERS[self.network_of(metric)])
            for metric in self.metrics
            if metric != "clip" and (metric not in FRECHET or self.bootstrap or not self.protocol.double)
        )

    def summed(self) -> frozenset[Layer]:
        """The layers whose moments are taken."""
        networks = {self.network_of(metric) for metric in self.metrics if metric in FRECHET}
        return moments_of(networks, self.protocol)


def moments_of(networks: Collection[str], protocol: Protocol) -> frozenset[Layer]:
    """The layers whose moments give a protocol's statistics: none where they come of features held in float32."""
    return frozenset((network, LAYERS[network]) for network in networks if protocol.double)


@dataclass
class Scored:
    """Everything that a result tells."""

    request: Request
    """What was asked."""
    pictures: Pictures
    """The pictures scored."""
    features: Features
    """What the networks saw in them."""
    reference: Reference | None
    """What they were compared with."""
    networks: dict[str, str]
    """sha256 of each network's file."""
    metrics: dict[str, dict[str, Any]]
    """By name: fid, is, kid, precision, recall, clip, fd-dinov2."""
    warnings: list[str]
    """What makes the scores less than they seem."""


def evaluate(request: Request) -> Scored:
    """Score pictures.

    Raises:
        ConfigError: what cannot be asked.
        DataError: pictures or statistics that are missing, damaged, or do not fit each other.
        CheckpointError: weights that are missing or of another network.
    """
    request.check()
    pictures = open_pictures(request.images)
    size = first_size(pictures)
    if "is" in request.metrics:
        scores.check_splits(request.settings, len(pictures))
    if "clip" in request.metrics and (first := pictures[0]).prompt is None:
        raise no_prompt(first.name)
    compared = any(metric in AGAINST_REFERENCE for metric in request.metrics)
    source = _open_reference(request.reference) if compared and request.reference else None
    if isinstance(source, Pictures):
        _check_pictures(source, size, request.reference_transform)
    networks = [
        build_network(name, request.protocol, layers, find_weights(name, request.weights), request.device)
        for name, layers in request.layers().items()
    ]
    clip = Clip(find_weights("clip", request.weights), request.device) if "clip" in request.metrics else None
    if isinstance(source, Reference):
        _check_statistics(request, source, networks, size)
    features = extract(
        *(pictures, networks, request.device),
        batch_size=request.batch_size,
        hold=request.held(),
        summed=request.summed(),
        clip=clip,
        workers=request.workers,
        progress="images",
    )
    reference = _see(request, source, networks, size) if isinstance(source, Pictures) else source
    warnings = [note for network in networks for note in network.notes] + list(clip.notes if clip else ())
    warnings += reference.notes if reference else []
    if pictures.lossy:
        warnings.append("some of the pictures are JPEG or WebP: what they lost moves the scores. PNG loses nothing.")
    ranker = (pictures.settings or {}).get("ranker") or {}
    if clip and ranker.get("sha256") == clip.weights.sha256:
        warnings.append("clip: its very weights chose these pictures among candidates: it measures the ranker.")
    metrics: dict[str, dict[str, Any]] = {}
    resizes = {network.name: network.resize for network in networks} | ({"clip": clip.resize} if clip else {})
    for metric in (bar := tqdm(request.metrics, unit=" metrics", disable=None)):
        bar.set_description(metric)
        measured, notes = _Measure(request, features, reference, networks).measure(metric)
        resize = resizes[request.network_of(metric)]
        metrics.update({name: {**score, "resize": resize} for name, score in measured.items()})
        warnings += notes
    used = {network.name: network.weights.sha256 for network in networks}
    if clip:
        used["clip"] = clip.weights.sha256
    return Scored(request, pictures, features, reference, used, metrics, warnings)


def _open_reference(source: str) -> Reference | Pictures:
    if source.endswith(SUFFIXES):
        return read_statistics(Path(source))
    return open_pictures(source)


def first_size(pictures: Pictures) -> tuple[int, int]:
    """(width, height) of the first picture. Raises: DataError where it is unreadable."""
    picture = pictures[0]
    try:
        return decode_plain(picture.data).size
    except DataError as error:
        reason = str(error).rpartition(". ")[0]
        raise DataError(f"picture {picture.name}: {reason}. Replace or remove it, and score again.") from error


def _check_pictures(pictures: Pictures, size: tuple[int, int] | None, transform: str) -> None:
    """A reference's, before any picture is passed through a network; of their sizes, that of the first."""
    if transform != "none":
        if size and size[0] != size[1]:
            raise ConfigError(
                f"--reference-transform {transform} makes squares, but the pictures to be scored are "
                f"{size[0]}x{size[1]}. Resize the reference's pictures yourself."
            )
    elif size and (found := first_size(pictures)) != size:
        raise other_size(found, size)
    if len(pictures) < 2:
        raise DataError(f"the reference {pictures.source} has {len(pictures)} picture: give at least 2.")


def _check_statistics(
    request: Request, reference: Reference, networks: Sequence[FeatureNetwork], size: tuple[int, int]
) -> None:
    """Before any picture is passed through a network."""
    if reference.size not in (None, size):
        raise other_size(reference.size, size)
    for metric in request.metrics:
        if metric not in AGAINST_REFERENCE:
            continue
        network = next(network for network in networks if network.name == request.network_of(metric))
        statistics = pick(reference, network.name, network.dim, request.protocol, network.weights.sha256)
        if metric in ("kid", "prc") and statistics.features is None:
            raise DataError(
                f"statistics {reference.path} hold no features of {network.name}, which {metric} needs. Give the "
                "pictures, or make them with reference_stats.py --features."
            )


def _see(request: Request, pictures: Pictures, networks: Sequence[FeatureNetwork], size: tuple[int, int]) -> Reference:
    """The reference's pictures, through the networks that compare."""
    names = {request.network_of(metric) for metric in request.metrics if metric in AGAINST_REFERENCE}
    whole = {request.network_of(metric) for metric in request.metrics if metric in ("kid", "prc")}
    return make_reference(
        pictures,
        [network for network in networks if network.name in names],
        request.protocol,
        request.device,
        size=size,
        transform=request.reference_transform,
        batch_size=request.batch_size,
        workers=request.workers,
        keep=whole,
    )


def make_reference(
    pictures: Pictures,
    networks: Sequence[FeatureNetwork],
    protocol: Protocol,
    device: torch.device,
    *,
    size: tuple[int, int] | None = None,
    transform: str = "none",
    batch_size: int = 64,
    workers: int | None = None,
    keep: Collection[str] = (),
) -> Reference:
    """Statistics of a reference's pictures; its features pass by, where the protocol averages in float64.

    transform: a name in REFERENCE_TRANSFORMS. keep: networks whose features are kept too.
    Raises: DataError for pictures that `extract` refuses, or fewer than two.
    """
    _check_pictures(pictures, size, transform)
    applied = None if transform == "none" else transform
    names = [network.name for network in networks]
    features = extract(
        *(pictures, networks, device),
        batch_size=batch_size,
        hold={(name, LAYERS[name]) for name in names if name in keep or not protocol.double},
        summed=moments_of(names, protocol),
        size=size,
        transform=applied,
        workers=workers,
        progress="reference",
    )
    reference = Reference(
        *("pictures", pictures.source, features.sha256, features.count, features.size, protocol.name), transform=applied
    )
    for network in networks:
        reference.networks[network.name] = statistics_of(
            features, network.name, protocol, network.weights.sha256, network.name in keep
        )
    return reference


class _Measure:
    """The metrics of one request, each from the features it needs."""

    def __init__(
        self, request: Request, features: Features, reference: Reference | None, networks: Sequence[FeatureNetwork]
    ) -> None:
        self._request, self._features, self._reference = request, features, reference
        self._networks = {network.name: network for network in networks}

    def measure(self, metric: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """({name: what a result says}, warnings) of a metric; prc gives precision and recall."""
        make = {
            "fid": self._frechet,
            "fd-dinov2": self._frechet,
            "is": self._inception_score,
            "kid": self._kernel,
            "prc": self._precision_recall,
            "clip": self._clip,
        }[metric]
        return make(metric)

    def _seen(self, metric: str) -> tuple[str, Tensor]:
        network = self._request.network_of(metric)
        return network, self._features.layers[network, LAYERS[network]]

    def _statistics(self, network: str) -> Statistics:
        assert self._reference is not None, "checked with the request"
        known = self._networks[network]
        return pick(self._reference, network, known.dim, self._request.protocol, known.weights.sha256)

    def _replicates(self, metric: str, value: float, score: Any) -> list[float] | None:
        if not self._request.bootstrap:
            return None
        drawn = resample(self._features.count, self._request.bootstrap, self._request.settings.seed, score, metric)
        return interval(value, drawn)

    def _frechet(self, metric: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
        network, count = self._request.network_of(metric), self._features.count
        if count < 2:
            raise DataError(f"{metric} of {count} picture: give at least 2, and rather {scores.FEW[metric]}.")
        ours, theirs = statistics_of(self._features, network, self._request.protocol), self._statistics(network)
        value = scores.frechet(ours, theirs)
        spread = None
        if self._request.bootstrap:
            _, seen = self._seen(metric)
            spread = self._replicates(metric, value, FrechetReplicates(seen, theirs, self._request.device))
        assert self._reference is not None, "checked with the request"
        notes = too_few(metric, count, len(ours.mu))
        notes += too_few(metric, self._reference.count, len(ours.mu), "reference ")
        return {metric: {"value": value, "interval": spread, "network": network, "layer": LAYERS[network]}}, notes

    def _inception_score(self, metric: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
        network, layer = self._request.network_of(metric), self._request.protocol.logits
        logits, settings = self._features.layers[network, layer], self._request.settings
        scored = scores.inception_score(logits, settings)

        def again(drawn: Any) -> float:
            return float(scores.inception_score(logits[torch.from_numpy(drawn)], settings)["value"])

        spread = self._replicates(metric, scored["value"], again)
        told = {**scored, "interval": spread, "network": network, "layer": layer}
        return {metric: told}, too_few(metric, len(logits))

    def _kernel(self, metric: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
        network, seen = self._seen(metric)
        theirs, settings = self._statistics(network).features, self._request.settings
        assert theirs is not None, "checked before the pass"
        scored = scores.kernel_distance(seen, theirs, settings)
        notes = too_few(metric, len(seen)) + too_few(metric, len(theirs), whose="reference ")
        if scored["subset_size"] < settings.kid_subset_size:
            notes.append(
                f"kid: subsets of {scored['subset_size']} pictures, not {settings.kid_subset_size}: there are no more."
            )

        def again(drawn: Any) -> float:
            return float(scores.kernel_distance(seen[torch.from_numpy(drawn)], theirs, settings)["value"])

        spread = self._replicates(metric, scored["value"], again)
        return {metric: {**scored, "interval": spread, "network": network, "layer": LAYERS[network]}}, notes

    def _precision_recall(self, metric: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Precision is a share of the generated pictures, whose resamples are binomial; recall has no interval.

        (A picture drawn twice is its own nearest neighbour: balls shrink, and resampled recall means nothing.)
        """
        network, seen = self._seen(metric)
        theirs = self._statistics(network).features
        assert theirs is not None, "checked before the pass"
        precision, recall = scores.precision_recall(seen, theirs, self._request.device)
        told = {"interval": None, "network": network, "layer": LAYERS[network], "neighbours": scores.NEIGHBOURS}
        spread = NORMAL * (precision * (1 - precision) / len(seen)) ** 0.5
        exact = [precision - spread, precision + spread] if self._request.bootstrap else None
        notes = too_few(metric, len(seen)) + too_few(metric, len(theirs), whose="reference ")
        return {
            "precision": {**told, "value": precision, "interval": exact},
            "recall": {**told, "value": recall},
        }, notes

    def _clip(self, metric: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
        cosines = self._features.cosines
        assert cosines is not None, "extracted where clip is asked for"
        value = float(cosines.double().mean())
        spread = self._replicates(metric, value, lambda drawn: float(cosines.double()[torch.from_numpy(drawn)].mean()))
        std = float(cosines.double().std()) if len(cosines) > 1 else 0.0
        told = {"value": value, "interval": spread, "std": std, "network": "clip"}
        return {metric: told}, too_few(metric, len(cosines))
