"""A tiny RQ-VAE with a discriminator, trained by the real Session, Trainer, RQVAETask and checkpoints.

B is the global batch; batch b holds images b*B .. b*B + B - 1, each a grid of random colours made smooth.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny_runs import CPU, KilledError

from megarq.config.models import RQVAEConfig
from megarq.config.run import CheckpointConfig, LogConfig, RQVAELossConfig, RQVAERunConfig, TrainConfig
from megarq.data.order import LoaderState
from megarq.engine.adversary import Adversary
from megarq.engine.codebook_start import start_codebook
from megarq.engine.rqvae_run import RQVAETask, decayed
from megarq.engine.session import Session
from megarq.engine.start import resolve_and_place
from megarq.rqvae.model import RQVAE
from megarq.rqvae.perceptual import LPIPS

BATCH, SIDE = 8, 16
SAMPLES_PER_EPOCH = 10 * BATCH


def tiny_stage1(steps: int, every: int = 100, loss: dict[str, Any] | None = None, **train: Any) -> RQVAERunConfig:
    """A run whose discriminator joins in at step 2; `loss` and `train` change fields."""
    model = RQVAEConfig(
        resolution=SIDE,
        channels=32,
        channel_multipliers=[1, 1, 1],
        res_blocks=1,
        attention_resolutions=[],
        latent_channels=8,
        codebook_dim=8,
        codebook_size=256,
        depth=3,
    )
    adversarial = {"perceptual_weight": 0.0, "discriminator_start": 2, "discriminator_channels": 8} | (loss or {})
    settings = {
        "steps": steps,
        "global_batch_size": BATCH,
        "lr": 1e-3,
        "betas": [0.5, 0.9],
        "weight_decay": 0.0,
        "clip": 1.0,
        "precision": "fp32",
        "seed": 3,
    } | train
    return RQVAERunConfig(
        model=model,
        loss=RQVAELossConfig(**adversarial),
        train=TrainConfig(**settings),
        checkpoint=CheckpointConfig(every=every, keep=0),
        log=LogConfig(validate_every=0),
    )


class Share(NamedTuple):
    """One rank's part of a batch."""

    images: torch.Tensor
    state: LoaderState
    skipped: int = 0


def global_images(number: int) -> torch.Tensor:
    """All images of batch `number`, [B, 3, 16, 16] in [-1, 1]."""
    coarse = torch.rand(BATCH, 3, 4, 4, generator=torch.Generator().manual_seed(number)) * 2 - 1
    return F.interpolate(coarse, size=SIDE, mode="bilinear")


@dataclass
class ImageBatches:
    """One rank's shares of the batches from `start` on; KilledError in place of batch `kill_at`."""

    rank: int
    ranks: int
    start: LoaderState
    kill_at: int | None = None

    def __iter__(self) -> Iterator[Share]:
        number = self.start.position(SAMPLES_PER_EPOCH) // BATCH
        while number != self.kill_at:
            first = (number + 1) * BATCH
            yield Share(global_images(number).chunk(self.ranks)[self.rank], LoaderState.at(first, SAMPLES_PER_EPOCH))
            number += 1
        raise KilledError


def stage1_run(
    run: Path,
    config: RQVAERunConfig,
    stage: int = 1,
    kill_at: int | None = None,
    device: torch.device = CPU,
    vgg: Path | None = None,
) -> dict[str, torch.Tensor]:
    """Start the run or go on with it, on all ranks of the default group; the run's folder holds what it wrote.

    `vgg` is VGG16's file, for a perceptual loss. Returns this rank's last numbers, on the CPU: of the RQ-VAE, and of
    the discriminator with its moments.
    """
    ds = {"zero_optimization": {"stage": stage}}
    resolved, topology = resolve_and_place(config, ds, dist.get_world_size(), dist.get_rank())
    session = Session.open(config, resolved, topology, run, device)
    torch.manual_seed(config.train.seed)
    module = RQVAE(config.model, session.groups.data, config.train.seed)
    batches = ImageBatches(topology.data_rank, topology.dp, session.start, kill_at)
    start_codebook(session, module, batches, new=True)
    adversary = None
    if config.loss.adversarial_weight:
        adversary = Adversary(module, config, SAMPLES_PER_EPOCH, session.groups, device)
    task = partial(
        RQVAETask,
        config=config,
        validation=None,
        shown=batches,
        groups=session.groups,
        device=device,
        perceptual=LPIPS(vgg) if vgg else None,
        adversary=adversary,
    )
    try:
        session.train(module, decayed, task, batches, SAMPLES_PER_EPOCH, lambda step: 1.0, beside=adversary)
    except KilledError:
        assert kill_at is not None
    beside = adversary.tensors() if adversary is not None else {}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in {**module.state_dict(), **beside}.items()}
