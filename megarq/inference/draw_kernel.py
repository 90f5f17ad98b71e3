"""The draw of one code for each row of logits as one Triton kernel: what `DepthSettings.draw` does, without sorting.

A program holds a row in registers. Codes are compared by how far their logit lies below the largest, whose bits, read
as an integer, are in the same order: a threshold is found by halving the range of integers 31 times. The k-th likeliest
code is the first threshold with k codes at or above it; the nucleus of top-p, the first whose codes reach the share.
Of codes equal to the threshold the first ones are kept, so many as are lacking.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def draw(logits: Tensor, uniform: Tensor, top_k: int, top_p: float, temperature: float) -> Tensor:
    """Codes [B] for logits [B, K] and fp64 numbers [B] in [0, 1), which stand on the cumulated distribution."""
    logits, uniform = logits.contiguous(), uniform.contiguous()
    rows, classes = logits.shape
    codes = torch.empty(rows, dtype=torch.int64, device=logits.device)
    block = triton.next_power_of_2(classes)
    _draw_row[(rows,)](
        logits,
        uniform,
        codes,
        classes,
        top_k,
        top_p,
        1 / temperature,
        block,
        top_k < classes,
        top_p < 1,
        num_warps=max(1, min(16, block // 512)),
    )
    return codes


@triton.jit
def _draw_row(
    logits_pointer,
    uniform_pointer,
    codes_pointer,
    classes,
    top_k,
    top_p,
    coldness,
    block: tl.constexpr,
    by_count: tl.constexpr,
    by_share: tl.constexpr,
):
    row = tl.program_id(0)
    code = tl.arange(0, block)
    there = code < classes
    logits = tl.load(logits_pointer + row.to(tl.int64) * classes + code, mask=there, other=float("-inf")).to(tl.float32)
    distance = tl.abs(logits - tl.max(logits, 0)) * coldness
    order = distance.to(tl.int32, bitcast=True)
    weights = tl.where(there, tl.exp(-distance), 0.0)
    if by_count:
        threshold = _threshold(order, there.to(tl.float32), top_k * 1.0)
        missing = top_k - tl.sum((order < threshold).to(tl.int32), 0)
        equal = there & (order == threshold)
        kept = (order < threshold) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= missing))
        weights = tl.where(kept, weights, 0.0)
    if by_share:
        share = top_p * tl.sum(weights, 0)
        threshold = _threshold(order, weights, share)
        equal = (order == threshold) & (weights > 0)
        lacking = share - tl.sum(tl.where(order < threshold, weights, 0.0), 0)
        reached = tl.cumsum(tl.where(equal, weights, 0.0), 0) - weights
        weights = tl.where((order < threshold) | (equal & (reached < lacking)), weights, 0.0)
    cumulated = tl.cumsum(weights.to(tl.float64), 0)
    target = tl.load(uniform_pointer + row) * tl.max(cumulated, 0)
    possible = weights > 0
    first = tl.min(tl.where(possible & (cumulated > target), code, block), 0)
    last = tl.max(tl.where(possible, code, 0), 0)
    tl.store(codes_pointer + row, tl.minimum(first, last).to(tl.int64))


@triton.jit
def _threshold(order, amounts, wanted):
    """The smallest number such that the amounts of the codes at or below it reach what is wanted."""
    low = tl.zeros((), tl.int32)
    high = low + 0x7F800000  # the bits of infinity
    for _ in range(31):
        middle = low + (high - low) // 2
        enough = tl.sum(tl.where(order <= middle, amounts, 0.0), 0) >= wanted
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return high
