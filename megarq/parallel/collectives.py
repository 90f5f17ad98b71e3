"""The regions of tensor parallelism, each an operation forward and its conjugate backward.

    copy_to         identity          all-reduce        before a layer cut by columns
    reduce_from     all-reduce        identity          after a layer cut by rows
    gather_from     all-gather        own slice         whole logits from slices of the vocabulary

Each is the identity where the tensor group has one rank. Three more are the identity unless `tp.sequence`, sequence
parallelism: between the cut layers, in LayerNorm, dropout and the residual sum, a rank then holds only its slice of
the tokens, and the two all-reduces become halves of themselves. Before a layer cut by columns the tokens are gathered,
and their gradients scattered, by the layer itself (`start_gather`, `start_scatter`), beside its products.

    scatter_tokens  reduce-scatter    all-gather        after a layer cut by rows
    split_tokens    own slice         all-gather        into a stack of blocks
    join_tokens     all-gather        own slice         out of it, where every rank goes on with all tokens

The B*S tokens of a batch are cut as one list, since S is rarely divisible by P: rows of zeros fill it up to a multiple
of P, and rank p holds rows p n to (p+1) n.
Shapes: B sequences, S tokens of each, n = ceil(B S / P), E width, N last dimension, P tensor-parallel size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
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


def scatter_tokens(x: Tensor, tp: TensorGroup) -> Tensor:
    """Leave a region whose layers are cut by rows: sum the partial [B, S, E], keep [n, E] of it."""
    return _ScatterTokens.apply(x, tp) if tp.sequence else x


def split_tokens(x: Tensor, tp: TensorGroup) -> Tensor:
    """Keep this rank's tokens, [B, S, E] to [n, E]."""
    return _SplitTokens.apply(x, tp) if tp.sequence else x


def join_tokens(x: Tensor, tp: TensorGroup, tokens: int) -> Tensor:
    """Join the ranks' tokens, [n, E] to [B, S, E], S being `tokens`."""
    return _JoinTokens.apply(x, tp, tokens) if tp.sequence else x


def start_all_reduce(x: Tensor, tp: TensorGroup) -> Callable[[], Tensor]:
    """Start to sum x over the ranks, in place; the answer waits for it."""
    work = dist.all_reduce(x, group=tp.group, async_op=True)
    return lambda: _waited(work, x)


def start_gather(x: Tensor, tp: TensorGroup, tokens: int) -> Callable[[], Tensor]:
    """Start to join the ranks' [n, E]; the answer waits for it and gives [B, S, E]."""
    rows = x.new_empty(tp.size * len(x), *x.shape[1:])
    work = dist.all_gather_into_tensor(rows, x.contiguous(), group=tp.group, async_op=True)
    batch = len(rows) // tokens
    return lambda: _waited(work, rows)[: batch * tokens].unflatten(0, (batch, tokens))


def start_scatter(x: Tensor, tp: TensorGroup) -> Callable[[], Tensor]:
    """Start to sum the ranks' [B, S, E]; the answer waits for it and gives this rank's [n, E]."""
    rows = _padded_rows(x, tp)
    own = rows.new_empty(len(rows) // tp.size, *rows.shape[1:])
    work = dist.reduce_scatter_tensor(own, rows, group=tp.group, async_op=True)
    return lambda: _waited(work, own)


def _waited(work: Any, result: Tensor) -> Tensor:
    work.wait()
    return result


def _padded_rows(x: Tensor, tp: TensorGroup) -> Tensor:
    """[B, S, E] to [P n, E]."""
    rows = x.flatten(0, 1).contiguous()
    missing = -len(rows) % tp.size
    assert missing < x.shape[1], "with a whole sequence of padding n P // S would not be B: check_layout refuses it"
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def _own_rows(x: Tensor, tp: TensorGroup) -> Tensor:
    return _padded_rows(x, tp).chunk(tp.size)[tp.rank].clone()


def _all_reduce(x: Tensor, tp: TensorGroup) -> Tensor:
    return start_all_reduce(x.clone(memory_format=torch.contiguous_format), tp)()


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


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorGroup) -> Tensor:
        ctx.tp, ctx.tokens = tp, x.shape[1]
        return start_scatter(x, tp)()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_gather(grads[0], ctx.tp, ctx.tokens)(), None


class _SplitTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorGroup) -> Tensor:
        ctx.tp, ctx.tokens = tp, x.shape[1]
        return _own_rows(x, tp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_gather(grads[0], ctx.tp, ctx.tokens)(), None


class _JoinTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorGroup, tokens: int) -> Tensor:
        ctx.tp = tp
        return start_gather(x, tp, tokens)()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _own_rows(grads[0], ctx.tp), None, None
