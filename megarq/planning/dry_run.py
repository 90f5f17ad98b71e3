"""A run of any size, rehearsed in one process: every shard built on the meta device, nothing allocated, nothing sent.

`dry_run(config, Layout(tp=8, pp=4, dp=16, zero=1))` takes the place of one rank of each pipeline stage and tensor rank
in turn, in a fake process group of all 512: the real process groups and the real layers. Data-parallel ranks differ in
what their optimisers own alone, and that is arithmetic (`sharding`). From there: shapes, state bytes, the checkpoint's
files, and whether each number of each parameter has one owner.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarq.checkpoint.format import Fragment, rank_file
from megarq.config.layout import check_layout
from megarq.config.models import RQTransformerConfig
from megarq.config.run import ParallelConfig, TrainConfig
from megarq.errors import ConfigError
from megarq.parallel.topology import ALONE, ProcessGroups, Topology
from megarq.planning.layout import Layout
from megarq.planning.sharding import Shard, Sharding, ShardParameter, model_shard, optimizer_sharding
from megarq.planning.state import FP32, StateBytes, state_bytes

KINDS = ("param", "exp_avg", "exp_avg_sq")
"""What a checkpoint holds of every parameter; "ema" too where there is one."""
GIB = 2**30
COLUMNS = ("parameters", "masters", "moments", "gradients", "ema", "buffers", "staging", "device", "host")
"""Of the page's table."""


@dataclass(frozen=True)
class RankKind:
    """What the ranks of one pipeline stage and tensor rank have in common."""

    shard: Shard
    sharding: Sharding

    def saved(self) -> Tensor:
        """[N, dp]: numbers that each data-parallel rank writes; parameters that are not cut are tensor rank 0's."""
        written = torch.tensor([p.dim is not None or self.shard.tensor_rank == 0 for p in self.shard.parameters])
        return self.sharding.length * written.unsqueeze(1)


@dataclass(frozen=True)
class DryRun:
    """What came of it."""

    layout: Layout
    whole: tuple[ShardParameter, ...]
    """The model's parameters as one rank alone would hold them."""
    kinds: Mapping[tuple[int, int], RankKind]
    """By pipeline stage and tensor rank."""
    faults: tuple[str, ...]
    """Numbers of parameters that have no owner or several; none where all is well."""

    def kind(self, rank: int) -> RankKind:
        """What a rank has in common with others."""
        topology = self.layout.topology(rank)
        return self.kinds[topology.pipeline_rank, topology.tensor_rank]

    def state(self, rank: int) -> StateBytes:
        """Bytes of a rank's state."""
        kind = self.kind(rank)
        return state_bytes(kind.shard, kind.sharding, self.layout, self.layout.topology(rank).data_rank)

    def fragments(self, rank: int) -> dict[str, tuple[Fragment, int]]:
        """What a rank writes into its file of a checkpoint, keyed "<kind>/<name>": places, and how many numbers."""
        kind, column = self.kind(rank), self.layout.topology(rank).data_rank
        starts, counts = kind.sharding.start[:, column].tolist(), kind.saved()[:, column].tolist()
        fragments: dict[str, tuple[Fragment, int]] = {}
        for parameter, start, count in zip(kind.shard.parameters, starts, counts, strict=True):
            if count:
                rank_of_slice = kind.shard.tensor_rank
                place = Fragment.of_slice(parameter.shape, parameter.dim, rank_of_slice, self.layout.tp, start)
                fragments |= {f"{name}/{parameter.name}": (place, count) for name in self._saved_kinds}
        return fragments

    def file_bytes(self) -> list[int]:
        """Bytes of tensors in the file of each rank; a header of their places comes on top."""
        sizes = {key: kind.saved().sum(0).tolist() for key, kind in self.kinds.items()}
        each = FP32 * len(self._saved_kinds)
        places = (self.layout.topology(rank) for rank in range(self.layout.world))
        return [each * sizes[place.pipeline_rank, place.tensor_rank][place.data_rank] for place in places]

    def facts(self) -> dict[str, Any]:
        """Plain values, ready for JSON. Tensor ranks of a stage hold slices of the same shapes."""
        files = self.file_bytes()
        states = [self.state(rank) for rank in range(self.layout.world)]
        per_stage = self.layout.tp * self.layout.dp
        return {
            "layout": asdict(self.layout) | {"world": self.layout.world},
            "parameters": {"tensors": len(self.whole), "numbers": sum(parameter.numel for parameter in self.whole)},
            "coverage": {"every_number_once": not self.faults, "faults": list(self.faults)},
            "stages": [
                self._stage_facts(stage, states[stage * per_stage : (stage + 1) * per_stage])
                for stage in range(self.layout.pp)
            ],
            "state_bytes_of_all_ranks": sum(state.total for state in states),
            "checkpoint": {
                "files": len(files),
                "tensor_bytes": sum(files),
                "largest_file": max(files),
                "smallest_file": min(files),
                "file_bytes": {rank_file(rank): size for rank, size in enumerate(files)},
            },
        }

    def _stage_facts(self, stage: int, states: list[StateBytes]) -> dict[str, Any]:
        """Of the ranks of one stage; the state is that of the rank with most."""
        shard = self.kinds[stage, 0].shard
        largest = max(states, key=lambda state: state.total)
        return {
            "stage": stage,
            "ranks": len(states),
            "layers": list(shard.layers),
            "numbers": shard.numel,
            "shapes": {parameter.name: list(parameter.shape) for parameter in shard.parameters},
            "state_bytes": asdict(largest) | {name: getattr(largest, name) for name in ("total", "device", "host")},
        }

    def render(self) -> str:
        """The page."""
        facts, layout = self.facts(), self.layout
        parameters, stages, files = facts["parameters"], facts["stages"], facts["checkpoint"]
        parts = [part for part in COLUMNS if any(stage["state_bytes"][part] for stage in stages)]
        owners = f"NOT each has one owner, {len(self.faults)} faults" if self.faults else "each has one owner"
        lines = [
            f"{layout.world:,} ranks: tp {layout.tp} x pp {layout.pp} x dp {layout.dp}, ZeRO-{layout.zero}, "
            f"{layout.precision}",
            f"{parameters['numbers']:,} numbers in {parameters['tensors']} parameters: {owners}",
            *(f"  {fault}" for fault in self.faults[:10]),
            "",
            "state of a rank in GiB, the largest of its stage",
            f"  {'stage':>5} {'ranks':>6} {'layers':>6} {'numbers held':>14}{''.join(f'{part:>11}' for part in parts)}",
        ]
        for stage in stages:
            sizes = "".join(f"{stage['state_bytes'][part] / GIB:>11.3f}" for part in parts)
            layers, numbers = len(stage["layers"]), stage["numbers"]
            lines.append(f"  {stage['stage']:>5} {stage['ranks']:>6,} {layers:>6} {numbers:>14,}{sizes}")
        lines += [
            "",
            f"checkpoint: {files['files']:,} files, {files['tensor_bytes'] / GIB:,.2f} GiB of tensors "
            f"({files['smallest_file'] / GIB:.3f} to {files['largest_file'] / GIB:.3f} GiB a file)",
        ]
        return "\n".join(lines)

    @property
    def _saved_kinds(self) -> tuple[str, ...]:
        return (*KINDS, "ema") if self.layout.ema else KINDS


def dry_run(config: RQTransformerConfig, layout: Layout) -> DryRun:
    """Rehearse a layout of any number of ranks. Raises ConfigError where it is unlawful or a process group exists."""
    config.validate()
    _check(config, layout)
    whole = model_shard(config, Layout(tp=1, pp=1, dp=1, zero=1), 0, ALONE).parameters
    kinds: dict[tuple[int, int], RankKind] = {}
    for stage in range(layout.pp):
        for tensor_rank in range(layout.tp):
            rank = stage * layout.tp * layout.dp + tensor_rank
            with _in_place_of(layout.topology(rank), layout.sequence) as groups:
                assert groups.tensor.rank == tensor_rank and dist.get_world_size(groups.data) == layout.dp
                shard = model_shard(config, layout, stage, groups.tensor)
            kinds[stage, tensor_rank] = RankKind(shard, optimizer_sharding(shard.parameters, layout))
    return DryRun(layout, whole, kinds, tuple(coverage_faults(whole, kinds, layout.tp)))


def _check(config: RQTransformerConfig, layout: Layout) -> None:
    """Every rule on layouts, as a run would meet them."""
    train = TrainConfig(
        steps=1,
        global_batch_size=layout.micro_batch * layout.accumulation * layout.dp,
        micro_batch_size=layout.micro_batch,
        precision=layout.precision,
    )
    train.validate()
    zero: dict[str, Any] = {"stage": layout.zero}
    if layout.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if layout.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    parallel = ParallelConfig(tp=layout.tp, pp=layout.pp, sequence=layout.sequence)
    check_layout(config, parallel, train, {"zero_optimization": zero}, layout.world)
    assert layout.zero > 0, "stage 0 runs as stage 1"


@contextmanager
def _in_place_of(topology: Topology, sequence: bool) -> Iterator[ProcessGroups]:
    """The process groups of a rank, in a process group that is torch's stand-in of that many ranks."""
    if dist.is_initialized():
        raise ConfigError(
            f"a process group of {dist.get_world_size()} ranks exists already, and a dry run needs one of its own. "
            "Run it in a process that has joined none."
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=topology.rank, world_size=topology.world_size)
    try:
        yield ProcessGroups.build(topology, sequence)
    finally:
        dist.destroy_process_group()


def coverage_faults(
    whole: tuple[ShardParameter, ...], kinds: Mapping[tuple[int, int], RankKind], tp: int
) -> Iterator[str]:
    """What is wrong with who owns what: one line for each parameter and each cause.

    The slices of the tensor ranks of one stage must make up the parameter, and the ranges of the data-parallel ranks
    each slice; no second stage may hold it.
    """
    held: dict[str, list[tuple[int, int, ShardParameter]]] = defaultdict(list)
    for (stage, tensor_rank), kind in kinds.items():
        for parameter in kind.shard.parameters:
            held[parameter.name].append((stage, tensor_rank, parameter))
        where = f"stage {stage}, tensor rank {tensor_rank}"
        for row in _untiled(kind).tolist():
            yield f"{kind.shard.parameters[row].name} on {where}: the data-parallel ranks' ranges leave gaps or overlap"
        if bool((kind.sharding.length.sum(0) > sum(kind.sharding.flats)).any()):
            yield f"{where}: a data-parallel rank owns more numbers than its partitions hold"
    for parameter in whole:
        holders = held.pop(parameter.name, [])
        stages = {stage for stage, _, _ in holders}
        if len(stages) != 1 or sorted(rank for _, rank, _ in holders) != list(range(tp)):
            yield f"{parameter.name} is on the stages {sorted(stages)}, {len(holders)} times for {tp} tensor ranks"
        elif not _makes_up(parameter, [slice_ for _, _, slice_ in holders]):
            shapes = [slice_.shape for _, _, slice_ in holders]
            yield f"{parameter.name} {parameter.shape} is cut into slices {shapes}"
    for name in held:
        yield f"{name} is no parameter of the whole model"


def _untiled(kind: RankKind) -> Tensor:
    """Rows of parameters whose ranges do not tile 0 .. n - 1."""
    sizes = kind.sharding.sizes.unsqueeze(1)  # [N, 1]
    owned = kind.sharding.length > 0
    starts, order = torch.where(owned, kind.sharding.start, sizes).sort(dim=1)  # what is empty comes last
    ends = starts + kind.sharding.length.gather(1, order)
    expected = torch.cat([torch.zeros_like(sizes), ends[:, :-1]], dim=1)
    wrong = (starts != expected).any(dim=1) | (ends[:, -1:] != sizes).squeeze(1)
    return wrong.nonzero().squeeze(1)


def _makes_up(whole: ShardParameter, slices: list[ShardParameter]) -> bool:
    """Whether equal slices along one dimension, or whole copies, are the parameter."""
    first = slices[0]
    if any((other.shape, other.dim) != (first.shape, first.dim) for other in slices):
        return False
    if first.dim is None:
        return first.shape == whole.shape
    rest = [size for dim, size in enumerate(first.shape) if dim != first.dim]
    fits = rest == [size for dim, size in enumerate(whole.shape) if dim != first.dim]
    return fits and prod(first.shape) * len(slices) == prod(whole.shape)
