"""Stage 1: training the RQ-VAE on images, with reconstruction, commitment, perceptual and adversarial losses."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarq.config.deepspeed import batch_sizes, zero_stage
from megarq.config.run import RQVAERunConfig
from megarq.data.files import local_part
from megarq.data.image_sources import ImageSource, open_images
from megarq.data.images import ImageBatch, ImageLoader
from megarq.engine.adversary import AdversarialPasses, Adversary
from megarq.engine.codebook_start import check_codebook_start, start_codebook
from megarq.engine.finetuning import InitFrom, first_weights
from megarq.engine.health import Health
from megarq.engine.metrics import Findings, past_metrics
from megarq.engine.passes import Passes, PlainPasses
from megarq.engine.pictures import labelled_rows
from megarq.engine.session import Session
from megarq.errors import ConfigError, DataError
from megarq.parallel.together import alike, gather_objects
from megarq.parallel.topology import ProcessGroups
from megarq.rqvae.discriminator import smallest_resolution
from megarq.rqvae.losses import RQVAELoss
from megarq.rqvae.model import RQVAE
from megarq.rqvae.perceptual import LPIPS, SMALLEST_RESOLUTION, find_vgg


def check_rqvae_run(
    config: RQVAERunConfig, ds: Mapping[str, Any], perceptual_weights: str | Path | None = None
) -> None:
    """Raise ConfigError for what stage 1 cannot do, under DeepSpeed's configuration `ds`; needs no process group.

    `perceptual_weights` is the file of VGG16, if one is given.
    """
    if zero_stage(ds) == 3:
        raise ConfigError(
            "ZeRO stage 3 for an RQ-VAE: its codebook is updated in place and read outside the layers that stage 3 "
            "gathers parameters for. Use --ds_config zero1.json or zero2.json."
        )
    if config.parallel.tp * config.parallel.pp > 1 or config.parallel.sequence:
        raise ConfigError(
            f"parallel.tp={config.parallel.tp}, parallel.pp={config.parallel.pp}: an RQ-VAE of 100M parameters is "
            "trained data-parallel. Set both to 1, and parallel.sequence=false."
        )
    if config.train.compile:
        raise ConfigError("train.compile=true: it compiles transformer blocks, which an RQ-VAE has none of. Remove it.")
    if config.train.activation_checkpointing:
        raise ConfigError(
            "train.activation_checkpointing=true: it recomputes transformer blocks, which an RQ-VAE has none of. Use a "
            "smaller train.micro_batch_size to save memory."
        )
    check_codebook_start(config)
    loss, resolution = config.loss, config.model.resolution
    if loss.adversarial_weight and resolution < (smallest := smallest_resolution(loss.discriminator_layers)):
        raise ConfigError(
            f"loss.discriminator_layers={loss.discriminator_layers} with model.resolution={resolution}: no patch is "
            f"left to judge below {smallest}. Use fewer layers, or loss.adversarial_weight=0."
        )
    if loss.perceptual_weight:
        if resolution < SMALLEST_RESOLUTION:
            raise ConfigError(
                f"loss.perceptual_weight={loss.perceptual_weight} with model.resolution={resolution}: LPIPS needs "
                f"{SMALLEST_RESOLUTION} or more. Set loss.perceptual_weight=0."
            )
        find_vgg(perceptual_weights)


def train_rqvae(
    session: Session,
    data: Sequence[str],
    validation: Sequence[str],
    flops_per_image: Callable[[int], float],
    perceptual_weights: str | Path | None = None,
    init_from: InitFrom | None = None,
) -> None:
    """Train or go on training. Raises ConfigError, DataError or CheckpointError where the parts do not fit.

    Args:
        session: this rank of the run; its config is an RQVAERunConfig.
        data: where pictures are, as `open_images` reads it.
        validation: where held-out pictures are; none for no validation.
        flops_per_image: to train on an image in a step, which is less before the discriminator joins in.
        perceptual_weights: file of VGG16 for the perceptual loss; by default the one in torch's cache.
        init_from: what a new run starts from in place of random weights.
    """
    config, topology = session.config, session.groups.topology
    assert isinstance(config, RQVAERunConfig)
    loader = partial(
        ImageLoader,
        resolution=config.model.resolution,
        global_batch_size=config.train.global_batch_size,
        rank=topology.data_rank,
        world_size=topology.dp,
        seed=config.train.seed,
        workers=config.data.workers,
        max_bad_rate=config.data.max_bad_rate,
    )
    bad_rate = config.data.max_bad_rate
    session.see(*map(local_part, (*data, *validation)), perceptual_weights, contents=False)
    source = open_alike(data, bad_rate)
    batches = loader(source, config.data.transform, start=session.start)
    held_out = loader(open_alike(validation, bad_rate), "center") if validation else None
    torch.manual_seed(config.train.seed)
    module = RQVAE(config.model, session.groups.data, config.train.seed)
    first, notes = first_weights(session, init_from)
    if first is not None:
        module.load_state_dict(first.state)
    notes += start_codebook(session, module, batches, new=first is None)
    adversary = None
    if config.loss.adversarial_weight:
        adversary = Adversary(module, config, batches.samples_per_epoch, session.groups, session.device)
        if first is not None and first.discriminator:
            adversary.take_weights(first.discriminator)
        micro_batch, accumulation = batch_sizes(config.train, topology.dp)
        if accumulation > 1:
            notes.append(
                f"lambda and the discriminator's BatchNorm are those of each of {accumulation} micro-batches, of "
                f"{micro_batch * topology.dp} pictures on all ranks, not those of the whole batch"
            )
    task = partial(
        RQVAETask,
        config=config,
        validation=held_out,
        shown=held_out or loader(source, "center"),
        groups=session.groups,
        device=session.device,
        perceptual=LPIPS(find_vgg(perceptual_weights)) if config.loss.perceptual_weight else None,
        adversary=adversary,
        history=past_metrics(session.run, session.checkpoint.metadata["step"])
        if session.checkpoint is not None and topology.rank == 0
        else (),
    )
    session.train(
        module, decayed, task, batches, batches.samples_per_epoch, flops_per_image, notes=notes, beside=adversary
    )


def open_alike(patterns: Sequence[str], max_bad_rate: float) -> ImageSource:
    """The pictures that --data names, the same list on all ranks (collective).

    Raises: as `open_images`, on all ranks; DataError where two ranks list other pictures.
    """
    source = alike(lambda: open_images(patterns, max_bad_rate))
    (count, fingerprint), *others = gather_objects((len(source), source.fingerprint()))
    for rank, (found, other) in enumerate(others, start=1):
        if other != fingerprint:
            raise DataError(
                f"{', '.join(patterns)}: rank 0 lists {count} pictures, rank {rank} lists {found}, and not the same. "
                "Copy what is missing, or start again when all nodes see the same files."
            )
    return source


def decayed(name: str) -> bool:
    """Whether weight decay applies to a parameter: to convolutions' weights, not to biases and norms."""
    return name.endswith("weight") and "norm" not in name


class RQVAETask:
    """The losses of an RQVAE under a DeepSpeed engine, and of the discriminator beside it."""

    def __init__(
        self,
        engine: Any,
        *,
        config: RQVAERunConfig,
        validation: ImageLoader | None,
        shown: ImageLoader,
        groups: ProcessGroups,
        device: torch.device,
        perceptual: LPIPS | None = None,
        adversary: Adversary | None = None,
        history: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """The first pictures of `shown` are drawn while it trains, every time the same.

        `history` are the metrics of the steps before, where a run goes on; only rank 0's alarms are heard.
        """
        self._engine, self._config, self._validation = engine, config, validation
        self._groups, self._device = groups, device
        loss = config.loss
        self._loss = RQVAELoss(loss.reconstruction, loss.commitment_weight, perceptual, loss.perceptual_weight).to(
            device
        )
        self._adversary = adversary
        self._health = Health(config, device, groups.data, history)
        self._shown_loader = shown
        self._skipped, self._skipped_so_far = 0, 0
        self.passes: Passes = PlainPasses(engine, self.losses)
        if adversary is not None:
            self.passes = AdversarialPasses(engine, self.losses, adversary)

    skippable = False
    """The codebook moves in the forward pass."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of all losses; the adversarial ones are missing before the discriminator's start."""
        perceptual = ("perceptual_loss",) if self._loss.perceptual is not None else ()
        adversarial = Adversary.terms if self._adversary is not None else ()
        return ("loss", "reconstruction_loss", *perceptual, "commitment_loss", *adversarial)

    def micro_batches(self, batch: ImageBatch, count: int) -> list[Tensor]:
        """Equal parts [b, 3, R, R] of a rank's share, in order."""
        self._skipped = batch.skipped
        return list(batch.images.chunk(count))

    def losses(self, images: Tensor) -> dict[str, Tensor]:
        """Scalars by name, "loss" among them; in training, with those of a discriminator that has joined in."""
        images = images.to(self._device)
        output = self._engine(images)
        if self._engine.module.training:
            self._health.add(output.codes)
        if self._adversary is not None and self._adversary.active and self._engine.module.training:
            return self._adversary.losses(images, output, self._loss)
        losses: dict[str, Tensor] = self._loss(images, output)
        return losses

    def validate(self) -> dict[str, float] | None:
        """Mean losses over one pass; the last batch is filled up from the next pass."""
        if self._validation is None:
            return None
        count = -(-self._validation.samples_per_epoch // self._config.train.global_batch_size)
        batches = [self.losses(batch.images) for batch in islice(self._validation, count)]
        names = list(batches[0])
        means = torch.stack([torch.stack([terms[name].float() for terms in batches]).mean() for name in names])
        dist.all_reduce(means, group=self._groups.data)
        return {
            f"validation_{name}": value / self._groups.topology.dp
            for name, value in zip(names, means.tolist(), strict=True)
        }

    def observe(self, step: int, values: Mapping[str, Any]) -> Findings:
        """How the codes were used, how many pictures could not be used, and warnings."""
        found = self._health.observe(step, values)
        counted = torch.tensor(self._skipped, device=self._device)
        dist.all_reduce(counted, group=self._groups.data)
        skipped = found.values["skipped_pictures"] = int(counted)
        self._skipped_so_far += skipped
        if skipped:
            found.lines.append(f"pictures skipped: {skipped}, {self._skipped_so_far} since the start")
        return found

    def pictures(self) -> tuple[Tensor, str]:
        """Originals, their reconstructions, and those from the codes of the first depth, the first two, ..."""
        model = self._engine.module
        codes = model.quantize(model.encode(self._shown))
        rows = [("original", self._shown), ("reconstruction", model.decode(codes))]
        rows += [
            (f"depths 1-{depth}" if depth > 1 else "depth 1", model.decode(codes, depth))
            for depth in range(1, self._config.model.depth)
        ]
        return labelled_rows(rows), "originals, reconstructions, and reconstructions from the first depths alone"

    @cached_property
    def _shown(self) -> Tensor:
        """The first pictures [n, 3, R, R]; rank 0, which shows them, has the same for any number of ranks."""
        count = self._config.log.sample_count
        images = next(iter(self._shown_loader)).images.to(self._device)
        if len(images) < count:
            parts = [torch.empty_like(images) for _ in range(self._groups.topology.dp)]
            dist.all_gather(parts, images, group=self._groups.data)
            images = torch.cat(parts)
        return images[:count]
