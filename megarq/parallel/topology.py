"""Where a rank stands in the grid pipeline x data x tensor, and the process groups along each axis.

Worked example: 8 ranks, tp=2, pp=2, hence dp=2. The tensor axis varies fastest, then data, then pipeline, as in
DeepSpeed's PipeModelDataParallelTopology:

    rank      0 1 2 3 4 5 6 7
    tensor    0 1 0 1 0 1 0 1
    data      0 0 1 1 0 0 1 1
    pipeline  0 0 0 0 1 1 1 1
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megarq.config.run import ParallelConfig
from megarq.launch.process_group import TIMEOUT


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that share each layer: a process group with this rank's place in it. `ALONE` is tp=1."""

    group: ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    sequence: bool = False
    """Whether each rank holds a slice of the tokens between the cut layers; `collectives` says how they are cut."""

    def __post_init__(self) -> None:
        assert self.size > 1 or not self.sequence, "one rank holds all tokens"


ALONE = TensorGroup()


@dataclass(frozen=True)
class Topology:
    """This rank's coordinates; pure arithmetic, usable before any process group exists."""

    world_size: int = 1
    rank: int = 0
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        ParallelConfig(self.tp, self.pp).data_parallel_size(self.world_size)  # raises where they do not divide

    @property
    def dp(self) -> int:
        """Data-parallel size: replicas that read different samples."""
        return self.world_size // (self.tp * self.pp)

    @property
    def tensor_rank(self) -> int:
        """Place along the tensor axis."""
        return self.rank % self.tp

    @property
    def data_rank(self) -> int:
        """Place along the data axis."""
        return self.rank // self.tp % self.dp

    @property
    def pipeline_rank(self) -> int:
        """Place along the pipeline axis."""
        return self.rank // (self.tp * self.dp)

    def on_stage(self, stage: int) -> int:
        """The rank that holds a stage of this rank's pipeline."""
        return self.rank + (stage - self.pipeline_rank) * self.tp * self.dp

    def lines(self, axis: str) -> list[list[int]]:
        """Every set of ranks that differ along `axis` ("tensor", "data" or "pipeline") alone."""
        place: Callable[[Topology], tuple[int, int]] = {
            "tensor": lambda other: (other.pipeline_rank, other.data_rank),
            "data": lambda other: (other.pipeline_rank, other.tensor_rank),
            "pipeline": lambda other: (other.data_rank, other.tensor_rank),
        }[axis]
        lines: dict[tuple[int, int], list[int]] = {}
        for rank in range(self.world_size):
            lines.setdefault(place(Topology(self.world_size, rank, self.tp, self.pp)), []).append(rank)
        return list(lines.values())


@dataclass(frozen=True)
class ProcessGroups:
    """The process groups that this rank is a member of."""

    topology: Topology
    tensor: TensorGroup
    data: ProcessGroup | None
    pipeline: ProcessGroup | None = None
    """None where the pipeline has one stage."""

    @classmethod
    def build(cls, topology: Topology, sequence: bool = False) -> "ProcessGroups":
        """Create the groups of every line on every rank (collective); none are needed without torch.distributed.

        `sequence` turns sequence parallelism on in the tensor group.
        """
        if not dist.is_initialized():
            return cls(topology, ALONE, None)
        tensor = _own_group(topology, "tensor") if topology.tp > 1 else None
        return cls(
            topology,
            TensorGroup(tensor, topology.tensor_rank, topology.tp, sequence) if tensor is not None else ALONE,
            _own_group(topology, "data"),
            _own_group(topology, "pipeline") if topology.pp > 1 else None,
        )


def _own_group(topology: Topology, axis: str) -> ProcessGroup:
    own: ProcessGroup | None = None
    for line in topology.lines(axis):
        group = dist.new_group(line, timeout=TIMEOUT)
        if isinstance(group, ProcessGroup) and topology.rank in line:
            own = group
    assert isinstance(own, ProcessGroup), "every rank stands in one line of each axis"
    return own
