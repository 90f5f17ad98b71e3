"""Which numbers of which parameters each rank's optimiser owns: DeepSpeed 0.19.8's arithmetic, without DeepSpeed.

Worked example: a group of two parameters of 7 and 6 numbers over dp=4.

    ZeRO-1, 2   13 numbers end to end, padded to a multiple of 2 dp: 16, 4 a rank
                first  0..3 | 4..6 of it and 0 of the second | 1..4 | 5, and three of padding
    ZeRO-3      each by itself, ceil(n / dp) a rank
                first  0..1 | 2..3 | 4..5 | 6, padding       second  0..1 | 2..3 | 4..5 | padding

Parameters with weight decay are one group, those without are another. Gradients in round robin and parameter alignment,
both off in DeepSpeed's defaults, would move the numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from megarq.config.models import RQTransformerConfig
from megarq.parallel.balance import balanced_parts
from megarq.parallel.topology import TensorGroup
from megarq.planning.flops import layer_flops
from megarq.planning.layout import Layout
from megarq.transformer.parameters import decayed
from megarq.transformer.stages import Stage, layer_list

ALIGNMENT = 2
"""ZeRO-1 and 2 pad each group to this many numbers for every data-parallel rank."""
SUB_GROUP = 1_000_000_000
"""ZeRO-3 ends a flat partition at the first parameter that brings it to so many numbers."""


@dataclass(frozen=True)
class ShardParameter:
    """A parameter as the ranks of one stage and tensor rank hold it before ZeRO."""

    name: str
    shape: tuple[int, ...]
    """Of this tensor rank's slice."""
    dim: int | None
    """Dimension that tensor parallelism cuts; None for a parameter that all tensor ranks hold whole."""

    @property
    def numel(self) -> int:
        """Numbers in the slice."""
        return prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """The part of the model of one pipeline stage and tensor rank, the same on all data-parallel ranks."""

    stage: int
    """Place along the pipeline axis."""
    tensor_rank: int
    """Place along the tensor axis."""
    layers: tuple[str, ...]
    """Names of the stage's layers."""
    parameters: tuple[ShardParameter, ...]
    """In the order that the engine sees them."""
    buffer_bytes: int
    """Frozen codebooks and what else is no parameter; they stay as they are made in every precision."""

    @property
    def numel(self) -> int:
        """Numbers in all parameters."""
        return sum(parameter.numel for parameter in self.parameters)


@dataclass(frozen=True)
class Sharding:
    """What the optimiser of each data-parallel rank owns of a shard's N parameters."""

    sizes: Tensor
    """[N]: numbers in each parameter."""
    start: Tensor
    """[N, dp]: the first number, in the flattened slice."""
    length: Tensor
    """[N, dp]: how many; 0 where a rank owns none."""
    flats: tuple[int, ...]
    """Numbers in each flat tensor that a rank's optimiser steps on, padding included; the same on all ranks."""


def model_shard(config: RQTransformerConfig, layout: Layout, stage: int, tensor: TensorGroup) -> Shard:
    """Build a stage on the meta device, through the layers' own constructors. Raises ConfigError."""
    part = balanced_parts(list(layer_flops(config).values()), layout.pp)[stage]
    layers = layer_list(config, tensor)[part.start : part.stop]
    with torch.device("meta"):
        built = Stage(config, layers, tensor)
    buffers = dict(built.named_buffers())
    assert not buffers.keys() & built.state_dict().keys(), "the plan of a checkpoint knows no buffers"
    return Shard(
        stage,
        tensor.rank,
        tuple(layer.name for layer in layers),
        tuple(
            ShardParameter(name, tuple(parameter.shape), getattr(parameter, "partition_dim", None))
            for name, parameter in built.named_parameters()
        ),
        sum(buffer.nbytes for buffer in buffers.values()),
    )


def optimizer_sharding(parameters: Sequence[ShardParameter], layout: Layout) -> Sharding:
    """What each data-parallel rank's optimiser owns of a shard."""
    sizes = torch.tensor([parameter.numel for parameter in parameters])
    start, length = torch.zeros(2, len(parameters), layout.dp, dtype=torch.int64)
    flats: list[int] = []
    for decay in (True, False):
        rows = [row for row, parameter in enumerate(parameters) if decayed(parameter.name) is decay]
        if rows:
            cut = _cut_each if layout.zero == 3 else _cut_flat
            start[rows], length[rows], own_flats = cut(sizes[rows], layout.dp)
            flats += own_flats
    return Sharding(sizes, start, length, tuple(flats))


def _cut_flat(sizes: Tensor, dp: int) -> tuple[Tensor, Tensor, list[int]]:
    """ZeRO-1 and 2: the parameters end to end, padded, in dp equal parts. `sizes` [n] gives [n, dp], [n, dp], [1]."""
    ends = sizes.cumsum(0).unsqueeze(1)  # [n, 1], in the flat tensor
    begins = ends - sizes.unsqueeze(1)
    part = -(-int(ends[-1]) // (ALIGNMENT * dp)) * ALIGNMENT
    first = torch.arange(dp) * part  # [dp]
    own = torch.maximum(begins, first)
    length = (torch.minimum(ends, first + part) - own).clamp(min=0)
    return (own - begins) * (length > 0), length, [part]


def _cut_each(sizes: Tensor, dp: int) -> tuple[Tensor, Tensor, list[int]]:
    """ZeRO-3: each parameter by itself in dp equal parts, the last ones padded. [n] gives [n, dp], [n, dp], flats."""
    parts = (sizes + dp - 1) // dp  # [n]
    first = parts.unsqueeze(1) * torch.arange(dp)
    length = torch.minimum(parts.unsqueeze(1), sizes.unsqueeze(1) - first).clamp(min=0)
    flats = [0]
    for part in parts.tolist():
        if flats[-1] >= SUB_GROUP:
            flats.append(0)
        flats[-1] += part
    return first * (length > 0), length, flats
