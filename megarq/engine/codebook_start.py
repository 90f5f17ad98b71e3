"""The codebook of a new run, from k-means of its first batches."""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor

from megarq.config.deepspeed import batch_sizes
from megarq.config.run import RQVAERunConfig
from megarq.data.images import ImageBatch
from megarq.engine.session import Session
from megarq.errors import ConfigError
from megarq.parallel.together import alike
from megarq.rqvae.kmeans import gather_sample, start_codebooks
from megarq.rqvae.model import RQVAE


def check_codebook_start(config: RQVAERunConfig) -> None:
    """Raise ConfigError where k-means would see fewer latents than it looks for codes."""
    start, (height, width, _) = config.codebook, config.model.code_shape
    latents = min(start.init_latents, start.init_batches * config.train.global_batch_size * height * width)
    if start.init == "kmeans" and latents < max(config.model.sizes):
        raise ConfigError(
            f"codebook.init=kmeans: codebook.init_batches={start.init_batches} batches have, and codebook.init_latents="
            f"{start.init_latents} allows, {latents} latents for {max(config.model.sizes)} codes. Give more, or set "
            "codebook.init=random."
        )


@torch.no_grad()
def start_codebook(session: Session, model: RQVAE, batches: Iterable[ImageBatch], new: bool) -> list[str]:
    """Start a run's codebook as `codebook.init` says, and tell the log (collective).

    Args:
        session: this rank of the run; one that goes on has its codebook.
        model: is on the session's device after k-means.
        batches: this rank's shares; passed over from the start, which leaves them as they were.
        new: whether the model's weights are not another's.

    Raises DataError, on all ranks, where pictures cannot be read.
    """
    config, topology = session.config, session.groups.topology
    assert isinstance(config, RQVAERunConfig)
    start = config.codebook
    if start.init != "kmeans" or session.checkpoint is not None:
        return []
    if not new:
        return ["codebook.init=kmeans is not used: the codebook comes with the first weights"]
    model.to(session.device).eval()
    micro_batch, accumulation = batch_sizes(config.train, topology.dp)

    def encode(images: Tensor) -> Tensor:
        return torch.cat([model.encode(part.to(session.device)) for part in images.split(micro_batch)])

    latents = alike(lambda: [encode(batch.images) for batch in islice(batches, start.init_batches)])
    model.train()
    sample = gather_sample(latents, start.init_latents, config.train.seed, session.groups.data)
    height, width, _ = config.model.code_shape
    batch = config.train.global_batch_size * height * width // accumulation
    start_codebooks(model.quantizer, sample, start.init_iterations, batch)
    return [f"codebook: k-means of {len(sample)} latents of the first {start.init_batches} batches"]
