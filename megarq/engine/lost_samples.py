"""What the ranks of stage 2 do about samples that some of them cannot read any more.

loader on one rank      another sample stands in (megarq/data/lost.py); the batch says how many, and what is lost
same_for_peers          ranks that share a model must read the same batch: all take that of the first among them
LostSamples             the count of all ranks for the metrics, warnings, and the end of the run where it is too high
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megarq.data.loader import CodeBatch
from megarq.engine.metrics import Findings
from megarq.errors import LostDataError
from megarq.parallel.together import gather_objects
from megarq.parallel.topology import ProcessGroups

SHOWN = 5
"""Reasons that an error tells."""


def same_for_peers(batch: CodeBatch, groups: ProcessGroups, device: torch.device) -> CodeBatch:
    """This batch, or where any rank that shares the model lost a sample of it, that of the first (collective).

    What is news to a rank stays with it.
    """
    topology = groups.topology
    lines = [
        (groups.tensor.group, topology.rank - topology.tensor_rank),
        (groups.pipeline, topology.on_stage(0)),
    ]
    peers = [(group, first) for group, first in lines if group is not None]
    if not peers:
        return batch
    lost = torch.tensor(batch.lost, device=device)
    for group, _ in peers:
        dist.all_reduce(lost, dist.ReduceOp.MAX, group=group)
    if not lost:
        return batch
    told = [batch]
    for group, first in peers:
        dist.broadcast_object_list(told, src=first, group=group, device=device)
    return replace(told[0], news=batch.news)


class LostSamples:
    """Counts them through an epoch."""

    def __init__(self, samples_per_epoch: int, max_rate: float, groups: ProcessGroups, device: torch.device) -> None:
        """max_rate: share of an epoch's samples that others may stand in for."""
        self._samples, self._max_rate, self._groups, self._device = samples_per_epoch, max_rate, groups, device
        self._since, self._news = 0, list[str]()
        self._epoch, self._in_epoch = 0, 0
        self._told: list[str] = []

    def add(self, batch: CodeBatch, training: bool) -> None:
        """Take in this rank's share of a batch; what validation misses is told, but not counted."""
        self._since += batch.lost if training else 0
        self._news += batch.news

    def observe(self, epoch: int) -> Findings:
        """The samples that others stood in for since the last call, and what cannot be read (collective).

        Raises: LostDataError, on all ranks, where there are too many in the epoch.
        """
        counted = torch.tensor([self._since, len(self._news)], device=self._device)
        dist.all_reduce(counted)
        lost, news = counted.tolist()
        lost //= self._groups.topology.tp * self._groups.topology.pp
        if epoch != self._epoch:
            self._epoch, self._in_epoch = epoch, 0
        self._in_epoch += lost
        found = Findings({"lost_samples": lost, "lost_in_epoch": self._in_epoch})
        if news:
            self._told += (lines := sorted({line for lines in gather_objects(self._news) for line in lines}))
            found.warnings = [f"{line.rstrip('.')}; other samples stand in for its own" for line in lines]
        self._since, self._news = 0, []
        if self._in_epoch > self._max_rate * self._samples:
            raise too_many(self._in_epoch, self._samples, self._max_rate, self._told)
        return found


def too_many(lost: int, samples: int, max_rate: float, reasons: Sequence[str]) -> LostDataError:
    """That more of an epoch's samples than is allowed cannot be read, and why."""
    shown = "\n".join(f"  {reason}" for reason in reasons[:SHOWN])
    more = f"\n  and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    return LostDataError(
        f"{lost} samples of an epoch of {samples} cannot be read, more than data.max_lost_rate={max_rate:g} allows. "
        f"Mend what is named here, or allow more, and give the same command again:\n{shown}{more}"
    )
