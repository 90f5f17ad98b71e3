"""Cross-entropy over a vocabulary cut across the tensor group, for hard and soft targets.

With logits z and targets q (a one-hot row for a hard target): loss = log sum_k exp(z_k) - sum_k q_k z_k and
d loss / d z_k = softmax(z)_k - q_k. Each sum over k is a local sum and one all-reduce of a number per token; no rank
ever holds another's logits. Everything is fp32, whatever the logits are.

Shapes: N tokens (any leading dimensions), K vocabulary, P tensor-parallel size.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarq.parallel.topology import ALONE, TensorGroup


def cross_entropy(logits: Tensor, targets: Tensor, tp: TensorGroup = ALONE) -> Tensor:
    """Loss of each token, [N] fp32.

    `logits` [N, K/P] is this rank's slice. `targets` is either int64 [N], or float [N, K/P]: this rank's slice of
    distributions over K that sum to 1.
    """
    if targets.dtype == torch.int64:
        return _HardCrossEntropy.apply(logits, targets, tp)
    return _SoftCrossEntropy.apply(logits, targets, tp)


def _all_reduce(x: Tensor, tp: TensorGroup, op: Any = dist.ReduceOp.SUM) -> Tensor:
    if tp.size > 1:
        dist.all_reduce(x, op=op, group=tp.group)
    return x


def _softmax_and_lse(logits: Tensor, tp: TensorGroup) -> tuple[Tensor, Tensor]:
    """softmax over all K of this rank's slice [N, K/P], and log-sum-exp [N, 1]."""
    z = logits.float()
    largest = _all_reduce(z.amax(dim=-1, keepdim=True), tp, dist.ReduceOp.MAX)
    exp = (z - largest).exp_()
    total = _all_reduce(exp.sum(dim=-1, keepdim=True), tp)
    return exp.div_(total), total.log() + largest


class _HardCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, tp: TensorGroup) -> Tensor:
        softmax, lse = _softmax_and_lse(logits, tp)
        size = logits.shape[-1]
        local = targets.unsqueeze(-1) - tp.rank * size  # [N, 1]
        own = (local >= 0) & (local < size)
        local = local.clamp(0, size - 1)
        picked = _all_reduce(logits.gather(-1, local).float() * own, tp)
        ctx.save_for_backward(softmax, local, own)
        ctx.dtype = logits.dtype
        return (lse - picked).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        softmax, local, own = ctx.saved_tensors
        grad = softmax.clone().scatter_add_(-1, local, -own.to(softmax.dtype))
        return grad.mul_(grads[0].unsqueeze(-1)).to(ctx.dtype), None, None


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, tp: TensorGroup) -> Tensor:
        softmax, lse = _softmax_and_lse(logits, tp)
        expected = _all_reduce((targets.float() * logits.float()).sum(dim=-1, keepdim=True), tp)
        ctx.save_for_backward(softmax, targets)
        ctx.dtype = logits.dtype
        return (lse - expected).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        softmax, targets = ctx.saved_tensors
        return ((softmax - targets) * grads[0].unsqueeze(-1)).to(ctx.dtype), None, None
