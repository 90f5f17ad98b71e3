"""How a codebook is used: counts of the codes chosen, and what they say.

    codes [B, H, W, D] of every step --CodeCounts.add, take--> counts [K] by depth --use_of--> usage, perplexity, dead

Shapes: B batch, H and W of the code stack, D depth, K codebook size (of the largest codebook).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megarq.rqvae.codebook import is_distributed


class Use(NamedTuple):
    """How the codes of one codebook are used."""

    usage: float
    """Share of the codes that were chosen at all."""
    perplexity: float
    """exp of the entropy of the choices: K where all codes are equally frequent, 1 where one is always chosen."""
    dead: int
    """Codes that were never chosen."""


def use_of(counts: Tensor) -> Use:
    """The use of a codebook whose codes were chosen `counts` [K] times; of no choices at all, perplexity 1."""
    used = int((counts > 0).sum())
    shares = counts.double() / counts.sum().clamp(min=1)
    entropy = torch.special.entr(shares).sum()
    return Use(used / len(counts), float(entropy.exp()), len(counts) - used)


class CodeCounts:
    """Counts over a window of training steps, kept on the device: adding to them never waits for it."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        """`sizes` are the codebook sizes of the depths."""
        self._sizes = tuple(sizes)
        self._counts = torch.zeros(len(sizes), max(sizes), dtype=torch.int64, device=device)
        self._firsts = torch.arange(len(sizes), device=device) * max(sizes)

    def add(self, codes: Tensor) -> None:
        """Count stacks of codes [..., D]."""
        places = (codes + self._firsts).flatten()
        # bincount would wait for the device, to learn how long its answer is.
        self._counts.view(-1).index_add_(0, places, torch.ones_like(places))

    def take(self, group: dist.ProcessGroup | None = None) -> list[Tensor]:
        """Counts [K_d] of each depth over all ranks of `group`, on the CPU; counting starts again (collective)."""
        if is_distributed(group):
            dist.all_reduce(self._counts, group=group)
        counts = [row[:size].to("cpu", copy=True) for row, size in zip(self._counts, self._sizes, strict=True)]
        self._counts.zero_()
        return counts
