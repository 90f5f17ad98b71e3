"""One model shared by all ranks of a job, for models larger than one GPU: the first rank asks, the others draw along.

with shared_generator(folder, device, dtype, batch_size, tp) as generator:
    if generator is not None:                       on the first rank
        generator.generate(prompts=..)              every rank computes its part
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megarq.errors import ConfigError
from megarq.inference.generator import ImageGenerator
from megarq.inference.sampling import Guidance, Progress
from megarq.inference.settings import DepthSettings
from megarq.launch.environment import read_environment
from megarq.launch.process_group import joined
from megarq.parallel.topology import ProcessGroups, Topology

Call = tuple[Tensor, list[DepthSettings], int, list[int], Guidance | None]
"""Conditions, on the CPU, settings, seed, indices and guidance of the codes to draw."""


class SharedGenerator(ImageGenerator):
    """An ImageGenerator whose RQ-Transformer is cut over all ranks; what the first draws, all draw."""

    drawing = False
    """On the first rank: whether the others draw along. After an error in the middle they no longer listen."""

    def _draw(
        self,
        cond: Tensor,
        settings: list[DepthSettings],
        seed: int,
        indices: list[int],
        guidance: Guidance | None,
        progress: Progress | None,
    ) -> Tensor:
        self.drawing = True
        _announce((cond.cpu(), settings, seed, indices, guidance))
        codes = super()._draw(cond, settings, seed, indices, guidance, progress)
        self.drawing = False
        return codes

    def follow(self) -> None:
        """On the other ranks: draw along until the first is done."""
        device = self.transformer.body_input.positions.device
        while (call := _announce(None)) is not None:
            cond, settings, seed, indices, guidance = call
            super()._draw(cond.to(device), settings, seed, indices, guidance, None)


@contextmanager
def shared_generator(
    folder: str | Path, device: torch.device, dtype: torch.dtype, batch_size: int, tp: int
) -> Iterator[ImageGenerator | None]:
    """A generator over `tp` ranks, all of the job, on the first; on the others None, when the first is done with it.

    Raises: ConfigError for another number of ranks, or one that does not divide the model; what from_pretrained raises.
    """
    environment = read_environment(os.environ)
    if environment.world_size != tp:
        raise ConfigError(
            f"--tp {tp} in a job of {environment.world_size} ranks: the model is shared by all ranks. Start as many, "
            f"such as torchrun --nproc_per_node {tp} COMMAND --tp {tp}."
        )
    with joined(environment, device):
        group = ProcessGroups.build(Topology(tp, environment.rank, tp)).tensor
        generator = SharedGenerator.from_pretrained(folder, device, dtype, batch_size, group)
        if environment.rank > 0:
            generator.follow()
            yield None
            return
        try:
            yield generator
        finally:
            if not generator.drawing:
                _announce(None)


def _announce(call: Call | None) -> Call | None:
    """What the first rank draws, on every rank; None where it is done."""
    calls = [call]
    dist.broadcast_object_list(calls, src=0)
    return calls[0]
