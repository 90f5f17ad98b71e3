"""How well an RQ-VAE gives pictures back: one pass over them, shared by any number of ranks, the same numbers always.

    pictures --transform--> x, uint8 --RQ-VAE--> codes --first d depths--> y_d, rounded to uint8
    (x, y_d) -> squared error, SSIM, LPIPS;   x, y_D -> features, of which rFID is made;   codes -> counts

Batch b holds pictures b B .. (b + 1) B - 1 and is rank b mod P's, so that all numbers of a picture come from the same
batch whatever P is; rank 0 puts them into the pictures' order before it sums anything.

Shapes: N pictures, n of one rank's, B batch, R resolution, D depth, K codebook size, C columns.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megarq.checkpoint.run_folder import checkpoint_at, checkpoints_folder
from megarq.config.models import RQVAEConfig
from megarq.data.pictures import Picture, PictureBatch, Pictures, PixelStream, open_pictures
from megarq.data.transforms import decode_rgb
from megarq.errors import CheckpointError, ConfigError, DataError
from megarq.inference.model_folder import CONFIG
from megarq.inference.pretrained import load_rqvae
from megarq.inference.runs import check_architecture, choose_weights, rqvae_of_checkpoint
from megarq.launch.environment import LaunchEnvironment
from megarq.launch.process_group import joined
from megarq.parallel.together import alike
from megarq.rqvae.codebook import exact_arithmetic
from megarq.rqvae.model import RQVAE, fingerprint
from megarq.rqvae.perceptual import LPIPS, SMALLEST_RESOLUTION, find_vgg
from megarq.scoring.distortion import WINDOW, squared_error, ssim
from megarq.scoring.networks import LAYERS, FeatureNetwork, build_network
from megarq.scoring.protocols import Protocol
from megarq.scoring.scores import FEW
from megarq.scoring.weights import Weights, find_weights

METRICS = ("rfid", "psnr", "ssim", "lpips")
"""As --metrics takes them."""
TRANSFORMS = ("none", "center")
"""As --transform takes them: those that decide nothing by chance."""
_SMALLEST = {"ssim": WINDOW, "lpips": SMALLEST_RESOLUTION}
SHOWN = 8
"""Pictures on the sheet, at most."""


@dataclass(frozen=True)
class ReconstructionRequest:
    """What is to be measured, and how."""

    model: Path
    """An exported model, an RQ-VAE folder, code shards, or a run of train_rqvae."""
    data: tuple[str, ...]
    """Folders, shards, LMDB or picture sets, one after another."""
    protocol: Protocol
    """How pictures become an rFID."""
    metrics: tuple[str, ...]
    """Names in METRICS."""
    device: torch.device
    """Where all networks run."""
    transform: str = "none"
    """Brings the pictures to the RQ-VAE's resolution; by default they must have it."""
    weights: dict[str, Path] = field(default_factory=dict)
    """Files of feature networks; those left out are looked for in caches."""
    perceptual_weights: Path | None = None
    """VGG16's file for LPIPS; by default the one in torch's cache."""
    depths: bool = False
    """Measure reconstructions from the first 1 .. D depths too."""
    shown: int = 0
    """Pictures to keep for a sheet."""
    count: int | None = None
    """Pictures to take, spread evenly over the data; by default all."""
    batch_size: int = 32
    """Pictures in one pass of the networks."""
    step: int | None = None
    """Of a run's checkpoint; by default the newest whole one."""
    model_weights: str | None = None
    """A run's ema or param; by default the moving average where the run kept one."""

    def check(self) -> None:
        """Raises: ConfigError for what cannot be asked."""
        for metric in self.metrics:
            if metric not in METRICS:
                raise ConfigError(f"--metrics {metric}: no such metric. Known: {', '.join(METRICS)}.")
        if not self.metrics:
            raise ConfigError(f"--metrics is empty. Name some of {', '.join(METRICS)}.")
        if self.transform not in TRANSFORMS:
            raise ConfigError(f"--transform {self.transform}: use one of {', '.join(TRANSFORMS)}.")
        for name, given in (("batch-size", self.batch_size), ("count", self.count)):
            if given is not None and given < 1:
                raise ConfigError(f"--{name} {given}: use 1 or more.")

    @property
    def columns(self) -> tuple[str, ...]:
        """What is measured of each pair of pictures: the squared error, and metrics that every pair has."""
        return ("mse", *(metric for metric in ("ssim", "lpips") if metric in self.metrics))


class Model(NamedTuple):
    """An RQ-VAE, and which one it is."""

    rqvae: RQVAE
    fingerprint: str
    """As code shards carry it."""
    weights: str | None
    """ema or param, where it is known."""
    step: int | None
    """Optimiser steps behind it, where they are known."""


class Networks(NamedTuple):
    """What looks at the pictures beside the RQ-VAE."""

    features: FeatureNetwork | None
    perceptual: LPIPS | None
    sha256: dict[str, str]
    """Of each network's file."""
    notes: list[str]
    """What a result should say about them."""


@dataclass(frozen=True)
class Share:
    """Which pictures are whose."""

    count: int
    """N."""
    batch_size: int
    """B."""
    rank: int = 0
    """This one's."""
    ranks: int = 1
    """P."""

    def places(self, rank: int) -> list[int]:
        """The pictures of a rank, ascending."""
        firsts = range(rank * self.batch_size, self.count, self.ranks * self.batch_size)
        return [place for first in firsts for place in range(first, min(first + self.batch_size, self.count))]


@dataclass
class Measured:
    """What is known of some pictures, or of all."""

    values: Tensor
    """fp64 [n, 1 or D, C]: a row for each depth, the last from all depths."""
    features: Tensor
    """fp32 [n, 2, dim] of originals and reconstructions; dim is 0 without rFID."""
    digests: Tensor
    """uint8 [n, 2, 32]: sha256 of each encoded picture, and of its reconstruction's pixels [3, R, R]."""
    counts: Tensor
    """int64 [D, K]: how often each code was chosen."""
    shown: Tensor
    """uint8 [s, 1 + D, 3, R, R]: originals, and reconstructions from the first 1 .. D depths."""


@dataclass
class Reconstructed:
    """Everything that a result tells."""

    request: ReconstructionRequest
    """What was asked."""
    pictures: Pictures
    """The pictures taken."""
    config: RQVAEConfig
    """The RQ-VAE's."""
    model: Model
    """Which RQ-VAE it is."""
    networks: Networks
    """What looked at the pictures."""
    measured: Measured
    """All pictures, in order."""


def reconstruct(request: ReconstructionRequest, environment: LaunchEnvironment) -> Reconstructed | None:
    """Measure all pictures, together with the other ranks of the job; None on ranks other than 0 (collective).

    Raises:
        ConfigError: what cannot be asked.
        DataError: pictures that are missing, damaged, of other sizes, or too few.
        CheckpointError: no RQ-VAE, one that has diverged, or weights that are missing or of another network.
    """
    request.check()
    pictures = _choose(request)
    model = load_model(request)
    _check_resolution(request, pictures, model.rqvae.config.resolution)
    networks = _build_networks(request)
    share = Share(len(pictures), request.batch_size, environment.rank, environment.world_size)
    if share.ranks == 1:
        measured = look(request, pictures, share, model.rqvae, networks)
    else:
        with joined(environment, torch.device("cpu")):  # what is gathered lies on the CPU
            measured = alike(lambda: look(request, pictures, share, model.rqvae, networks))
            _gather(measured, share, request.shown)
    if share.rank:
        return None
    return Reconstructed(request, pictures, model.rqvae.config, model, networks, measured)


def _choose(request: ReconstructionRequest) -> Pictures:
    pictures = open_pictures(*request.data)
    total, count = len(pictures), request.count or len(pictures)
    if count > total:
        raise ConfigError(f"--count {count} of the {total} pictures of {pictures.source}. Give at most {total}.")
    if "rfid" in request.metrics and count < 2:
        raise DataError(f"rfid of {count} picture: give at least 2, and rather {FEW['rfid']}.")
    return replace(pictures, count=count, read=lambda index: pictures[index * total // count])


def load_model(request: ReconstructionRequest) -> Model:
    """The RQ-VAE of a folder or of a run's checkpoint. Raises: CheckpointError where there is none."""
    path, step, weights = request.model, request.step, request.model_weights
    if checkpoints_folder(path).is_dir() and not (path / CONFIG).exists():
        checkpoint = checkpoint_at(path, step)
        check_architecture(checkpoint, "rq-vae", path)
        weights = choose_weights(checkpoint, weights)
        rqvae, step = rqvae_of_checkpoint(checkpoint, weights).to(request.device), checkpoint.metadata.get("step")
    else:
        rqvae = load_rqvae(path, request.device)
        if step is not None or weights is not None:
            raise ConfigError(
                f"--step and --weights choose among a run's checkpoints, and {path} is an exported model. Leave them "
                "out."
            )
    return Model(rqvae.requires_grad_(False), fingerprint(rqvae), weights, step)


def _check_resolution(request: ReconstructionRequest, pictures: Pictures, resolution: int) -> None:
    """Before any network is built, as far as the first picture tells."""
    for metric, least in _SMALLEST.items():
        if metric in request.metrics and resolution < least:
            raise ConfigError(
                f"--metrics {metric} needs pictures of {least}x{least} or more, the RQ-VAE's are "
                f"{resolution}x{resolution}. Leave {metric} out."
            )
    first = pictures[0]
    try:
        width, height = decode_rgb(first.data).size
    except DataError:
        return  # the pass says which picture it is
    if request.transform == "none" and (width, height) != (resolution, resolution):
        raise DataError(
            f"picture {first.name} is {width}x{height}, the RQ-VAE's are {resolution}x{resolution}. Use --transform "
            "center, or pictures of that size."
        )


def _build_networks(request: ReconstructionRequest) -> Networks:
    features, perceptual = None, None
    sha256: dict[str, str] = {}
    notes: list[str] = []
    if "rfid" in request.metrics:
        name = request.protocol.network
        weights = find_weights(name, request.weights)
        features = build_network(name, request.protocol, [LAYERS[name]], weights, request.device)
        sha256[name] = features.weights.sha256
        notes += features.notes
    if "lpips" in request.metrics:
        vgg = find_vgg(request.perceptual_weights, "leave lpips out of --metrics")
        perceptual = LPIPS(vgg).to(request.device)
        weights = Weights("vgg16", vgg)
        sha256["vgg16"] = weights.sha256
        notes += [f"lpips: {note}" for note in weights.notes]
    return Networks(features, perceptual, sha256, notes)


@torch.no_grad()
def look(
    request: ReconstructionRequest, pictures: Pictures, share: Share, rqvae: RQVAE, networks: Networks
) -> Measured:
    """Pass one rank's share of the pictures through the networks, in memory that grows with the results alone.

    Raises: DataError for unreadable pictures and those of other sizes.
    """
    mine, config = share.places(share.rank), rqvae.config
    depths = range(1, config.depth + 1) if request.depths else (config.depth,)
    found = _nothing(len(mine), len(depths), len(request.columns), networks, config)

    def read(index: int) -> Picture:
        picture = pictures[mine[index]]
        found.digests[index, 0] = _digest(picture.data)
        return picture

    stream = PixelStream(
        replace(pictures, count=len(mine), read=read),
        share.batch_size,
        transform=request.transform,
        resolution=config.resolution,
        progress="reconstructing" if share.rank == 0 else "",
    )
    wanted = set(_shown(share.count, request.shown))
    counts = found.counts.to(request.device)
    first = 0
    with exact_arithmetic(request.device.type):
        for batch in stream:
            rows = slice(first, first := first + len(batch.pixels))
            x = batch.pixels.to(request.device)
            codes = rqvae.quantize(_finite(rqvae.encode(_to_images(x)), request, batch))
            for depth, row in enumerate(counts):
                row += torch.bincount(codes[..., depth].flatten(), minlength=len(row))
            y = x
            for row, depth in enumerate(depths):
                y = _to_pixels(_finite(rqvae.decode(codes, depth), request, batch))
                found.values[rows, row] = _compare(x, y, request.columns, networks.perceptual)
            if networks.features:
                for column, pixels in enumerate((x, y)):
                    found.features[rows, column] = networks.features.module(pixels)[0].cpu()
            found.digests[rows, 1] = torch.stack([_digest(pixels.numpy().tobytes()) for pixels in y.cpu()])
            kept = [index for index, place in enumerate(mine[rows]) if place in wanted]
            found.shown = torch.cat([found.shown, _sheet_rows(rqvae, x[kept], codes[kept])]) if kept else found.shown
    found.counts = counts.cpu()
    return found


def _nothing(count: int, depths: int, columns: int, networks: Networks, config: RQVAEConfig) -> Measured:
    """Room for what will be measured, and none of the pictures to show."""
    return Measured(
        values=torch.empty(count, depths, columns, dtype=torch.float64),
        features=torch.empty(count, 2, networks.features.dim if networks.features else 0),
        digests=torch.empty(count, 2, hashlib.sha256().digest_size, dtype=torch.uint8),
        counts=torch.zeros(config.depth, max(config.sizes), dtype=torch.int64),
        shown=torch.empty(0, 1 + config.depth, 3, config.resolution, config.resolution, dtype=torch.uint8),
    )


def _finite(numbers: Tensor, request: ReconstructionRequest, batch: PictureBatch) -> Tensor:
    """The numbers [B, ..] that the RQ-VAE made of a batch. Raises: CheckpointError where one is not finite."""
    finite = numbers.isfinite().flatten(1).all(1)
    if not finite.all():
        name = batch.names[int(finite.int().argmin())]
        raise CheckpointError(
            f"the RQ-VAE of {request.model} makes numbers of picture {name} that are not finite: its training "
            "diverged. Use another step's checkpoint."
        )
    return numbers


def _to_images(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, R, R] -> fp32 in [-1, 1], as in training."""
    return pixels.float().div_(127.5).sub_(1.0)


def _to_pixels(images: Tensor) -> Tensor:
    """fp32 [B, 3, R, R] in about [-1, 1] -> uint8, as pictures are saved."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _compare(x: Tensor, y: Tensor, columns: tuple[str, ...], perceptual: LPIPS | None) -> Tensor:
    """uint8 [B, 3, R, R] twice -> fp64 [B, C] on the CPU."""
    measures: dict[str, Callable[[], Tensor]] = {
        "mse": lambda: squared_error(x, y),
        "ssim": lambda: ssim(x, y),
        "lpips": lambda: _perceptual(perceptual).distances(_to_images(y), _to_images(x)).double(),
    }
    return torch.stack([measures[column]() for column in columns], 1).cpu()


def _perceptual(network: LPIPS | None) -> LPIPS:
    assert network is not None, "built where it is asked for"
    return network


def _digest(content: bytes) -> Tensor:
    """sha256 of bytes, uint8 [32]."""
    return torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)


def _sheet_rows(rqvae: RQVAE, x: Tensor, codes: Tensor) -> Tensor:
    """Originals and what the first 1 .. D depths make of their codes: [s, 1 + D, 3, R, R] on the CPU."""
    made = [_to_pixels(rqvae.decode(codes, depth)) for depth in range(1, rqvae.config.depth + 1)]
    return torch.stack([x, *made], 1).cpu()


def _shown(count: int, wanted: int) -> list[int]:
    """Pictures for the sheet, spread evenly over all."""
    wanted = min(wanted, count)
    return [place * count // wanted for place in range(wanted)]


def _gather(measured: Measured, share: Share, shown: int) -> None:
    """Bring all ranks' rows to rank 0, in the pictures' order (collective)."""
    everyones = [share.places(rank) for rank in range(share.ranks)]
    for name in ("values", "features", "digests"):
        setattr(measured, name, _in_order(getattr(measured, name), everyones, share))
    chosen = _shown(share.count, shown)
    owned = [set(places) for places in everyones]
    whose = [[index for index, place in enumerate(chosen) if place in places] for places in owned]
    measured.shown = _in_order(measured.shown, whose, share)
    dist.all_reduce(measured.counts)


def _in_order(rows: Tensor, everyones: list[list[int]], share: Share) -> Tensor:
    """All rows on rank 0, where rank r's belong at everyones[r]; the others keep none. One rank's are under way."""
    if share.rank:
        if len(rows) and rows.numel():
            dist.send(rows.contiguous(), 0)
        return rows[:0]
    whole = rows.new_empty(sum(map(len, everyones)), *rows.shape[1:])
    for rank, places in enumerate(everyones):
        if rank and places and whole.numel():
            rows = rows.new_empty(len(places), *whole.shape[1:])
            dist.recv(rows, rank)
        whole[places] = rows[: len(places)]
    return whole
