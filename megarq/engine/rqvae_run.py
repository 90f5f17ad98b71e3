"""Stage 1: training the RQ-VAE on image shards, with reconstruction and commitment loss."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.utils import make_grid

from megarq.config.deepspeed import zero_stage
from megarq.config.run import RQVAERunConfig
from megarq.data.files import expand_shards
from megarq.data.images import ImageBatch, ImageLoader
from megarq.engine.passes import PlainPasses
from megarq.engine.session import Session
from megarq.errors import ConfigError
from megarq.parallel.topology import ProcessGroups
from megarq.rqvae.losses import RQVAELoss
from megarq.rqvae.model import RQVAE


def check_rqvae_run(config: RQVAERunConfig, ds: Mapping[str, Any]) -> None:
    """Raise ConfigError for what stage 1 cannot do, under DeepSpeed's configuration `ds`; needs no process group."""
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
    for name in ("perceptual_weight", "adversarial_weight"):
        if getattr(config.loss, name):
            raise ConfigError(
                f"loss.{name}={getattr(config.loss, name)}: this release trains with reconstruction and commitment "
                "loss alone. Set loss.perceptual_weight=0 loss.adversarial_weight=0."
            )


def train_rqvae(session: Session, data: Sequence[str], validation: Sequence[str], flops_per_image: float) -> None:
    """Train or go on training. Raises ConfigError, DataError or CheckpointError where the parts do not fit.

    Args:
        session: this rank of the run; its config is an RQVAERunConfig.
        data: patterns of image shards.
        validation: patterns of held-out image shards; none for no validation.
        flops_per_image: of a training step.
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
    batches = loader(expand_shards(data), config.data.transform, start=session.start)
    held_out = loader(expand_shards(validation), "center") if validation else None
    torch.manual_seed(config.train.seed)
    module = RQVAE(config.model, session.groups.data, config.train.seed)
    task = partial(RQVAETask, config=config, validation=held_out, groups=session.groups, device=session.device)
    session.train(module, decayed, task, batches, batches.samples_per_epoch, flops_per_image)


def decayed(name: str) -> bool:
    """Whether weight decay applies to a parameter: to convolutions' weights, not to biases and norms."""
    return name.endswith("weight") and "norm" not in name


class RQVAETask:
    """Reconstruction and commitment loss under a DeepSpeed engine around an RQVAE."""

    terms = ("loss", "reconstruction_loss", "commitment_loss")

    def __init__(
        self,
        engine: Any,
        *,
        config: RQVAERunConfig,
        validation: ImageLoader | None,
        groups: ProcessGroups,
        device: torch.device,
    ) -> None:
        self._engine, self._config, self._validation = engine, config, validation
        self._groups, self._device = groups, device
        self._loss = RQVAELoss(config.loss.reconstruction, config.loss.commitment_weight)
        self.passes = PlainPasses(engine, self.losses)

    def micro_batches(self, batch: ImageBatch, count: int) -> list[Tensor]:
        """Equal parts [b, 3, R, R] of a rank's share, in order."""
        return list(batch.images.chunk(count))

    def losses(self, images: Tensor) -> dict[str, Tensor]:
        """Scalars "loss", "reconstruction_loss" and "commitment_loss"."""
        images = images.to(self._device)
        losses: dict[str, Tensor] = self._loss(images, self._engine(images))
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

    def pictures(self) -> tuple[Tensor, str] | None:
        """Held-out pictures above their reconstructions."""
        if self._validation is None:
            return None
        images = next(iter(self._validation)).images[: self._config.log.sample_count].to(self._device)
        shown = torch.cat([images, self._engine(images).reconstruction.float()]).clamp(-1, 1).add(1).div(2)
        return make_grid(shown.cpu(), nrow=len(images)), "originals above, reconstructions below"
