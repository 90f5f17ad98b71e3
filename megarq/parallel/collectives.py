"""The four regions of tensor parallelism, each an operation forward and its conjugate backward.

    copy_to      identity       all-reduce      before a layer cut by columns
    reduce_from  all-reduce     identity        after a layer cut by rows
    gather_from  all-gather     own slice       whole logits from slices of the vocabulary
    split_to     own slice      all-gather      a whole tensor into a region cut along its last dimension

Each is the identity where the tensor group has one rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarq.parallel.topology import TensorGroup


def copy_to(x: Tensor, tp: TensorGroup) -> Tensor:
    """Enter a region whose layers are cut by columns."""
    return x if tp.size == 1 else _Copy.apply(x, tp)


def reduce_from(x: Tensor, tp: TensorGroup) -> Tensor:
    """Leave a region whose layers are cut by rows: sum the partial results."""
    return x if tp.size == 1 else _Reduce.apply(x, tp)


def gather_from(x: Tensor, tp: TensorGroup) -> Tensor:
    """Join the slices of the last dimension, [..., N/P] to [..., N]."""
    return x if tp.size == 1 else _Gather.apply(x, tp)


def split_to(x: Tensor, tp: TensorGroup) -> Tensor:
    """Keep this rank's slice of the last dimension, [..., N] to [..., N/P]."""
    return x if tp.size == 1 else _Split.apply(x, tp)


def _all_reduce(x: Tensor, tp: TensorGroup) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=tp.group)
    return x


def _all_gather(x: Tensor, tp: TensorGroup) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(tp.size)]
    dist.all_gather(parts, x.contiguous(), group=tp.group)
    return torch.cat(parts, dim=-1)


def _own_slice(x: Tensor, tp: TensorGroup) -> Tensor:
    return x.chunk(tp.size, dim=-1)[tp.rank].contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorGroup) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grads[0], ctx.tp), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorGroup) -> Tensor:
        return _all_reduce(x, tp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorGroup) -> Tensor:
        ctx.tp = tp
        return _all_gather(x, tp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _own_slice(grads[0], ctx.tp), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorGroup) -> Tensor:
        ctx.tp = tp
        return _own_slice(x, tp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grads[0], ctx.tp), None
