"""Drawing stacks of codes from an RQ-Transformer: the training blocks, one token at a time, against key-value caches.

    context = read_condition(cond)                      the body reads L tokens; its last output is h_1
    for t = 1..T:
        for d = 1..D:                                   a fresh head cache for each position
            logits = next_logits(context, codes drawn at t so far)
            draw k_td from logits: temperature, then top-k, then top-p
        context = read_stack(codes drawn at t)          one body token gives h_{t+1}

What is random about a picture is T * D uniform numbers that depend on the seed and the picture's index alone, so a
picture is the same whatever pictures are drawn beside it (as far as the device's products do not depend on the batch).

Shapes: B batch, T = H x W positions, D depth, L condition length, E width, K codebook size, P tensor-parallel size.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megarq.errors import ConfigError
from megarq.parallel.collectives import gather_from
from megarq.parallel.initialization import named_generator
from megarq.transformer.rq_transformer import RQTransformer

Choose = Callable[[Tensor, int, int], Tensor]
"""From logits [B, K_d], position and depth to codes [B]."""
Progress = Callable[[int], object]
"""Told, after each position, how many stacks were drawn: the batch size."""
Counts = int | Sequence[int | None] | None
Shares = float | Sequence[float]

_COOLEST = 1e-6


@dataclass(frozen=True)
class DepthSettings:
    """How the codes of one depth are drawn."""

    top_k: int
    """Draw among the k likeliest codes; 1 is the likeliest, always."""
    top_p: float
    """Of those, draw among the likeliest whose probabilities, in falling order, first reach this sum."""
    temperature: float
    """Divides the logits, before the rest."""

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Codes [B] for fp32 logits [B, K] and fp64 numbers [B] in [0, 1), by inverting the cumulated distribution."""
        if self.top_k == 1:
            return logits.argmax(-1)
        scaled = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        order = None
        if self.top_k < logits.shape[-1] or self.top_p < 1:
            scaled, order = scaled.topk(self.top_k, dim=-1)  # falling
        cumulated = scaled.softmax(-1).cumsum(-1, dtype=torch.float64)
        total = cumulated[..., -1:]
        if self.top_p < 1:
            last = (cumulated < self.top_p).sum(-1, keepdim=True).clamp(max=cumulated.shape[-1] - 1)
            total = cumulated.gather(-1, last)
        # Strictly below the total, rounding included, so that no code beyond it and none of probability 0 is drawn.
        target = torch.minimum(uniform.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
        index = torch.searchsorted(cumulated, target, right=True).clamp(max=cumulated.shape[-1] - 1)
        return (index if order is None else order.gather(-1, index)).squeeze(-1)


def depth_settings(
    sizes: Sequence[int], top_k: Counts = None, top_p: Shares = 1.0, temperature: Shares = 1.0
) -> list[DepthSettings]:
    """The settings of each depth, from one value for all depths or one for each.

    Args:
        sizes: codebook size of each depth.
        top_k: 1 or more, capped at the codebook size; None for all codes.
        top_p: above 0, at most 1.
        temperature: above 0.

    Raises:
        ConfigError: a value out of range, or another number of values than depths.
    """
    counts = _each("top_k", top_k, len(sizes))
    shares = _each("top_p", top_p, len(sizes))
    temperatures = _each("temperature", temperature, len(sizes))
    return [
        DepthSettings(_top_k(count, size), _top_p(share), _temperature(value))
        for size, count, share, value in zip(sizes, counts, shares, temperatures, strict=True)
    ]


def _each(name: str, value: Any, depth: int) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * depth
    if len(value) == 1:
        return list(value) * depth
    if len(value) != depth:
        raise ConfigError(f"{name}={list(value)}: {len(value)} values for {depth} depths. Give one value, or {depth}.")
    return list(value)


def _top_k(value: Any, size: int) -> int:
    if value is None:
        return size
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if count < 1 or isinstance(value, bool):
        raise ConfigError(f"top_k={value!r}: give a whole number from 1 (the likeliest code) to {size} (all codes).")
    return min(count, size)


def _top_p(value: Any) -> float:
    number = _number(value)
    if not 0 < number <= 1:
        raise ConfigError(f"top_p={value!r}: give a share of the probability above 0 and at most 1 (all codes).")
    return number


def _temperature(value: Any) -> float:
    number = _number(value)
    if not _COOLEST <= number < float("inf"):
        raise ConfigError(
            f"temperature={value!r}: give a number of at least {_COOLEST:g}; 1 leaves the model's probabilities as "
            "they are, and top_k=1 always takes the likeliest code."
        )
    return number


def _number(value: Any) -> float:
    try:
        return float("nan") if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError):
        return float("nan")


def check_seed(seed: Any) -> int:
    """The seed as an int. Raises ConfigError for anything that is not a whole number."""
    try:
        if not isinstance(seed, bool):
            return operator.index(seed)
    except TypeError:
        pass
    raise ConfigError(f"seed={seed!r}: give a whole number, such as 0.")


class CachedForward:
    """The forward pass of `RQTransformer`, token by token; each step's logits are those of the whole pass."""

    def __init__(self, transformer: RQTransformer, batch: int) -> None:
        self.transformer = transformer
        self._body_caches, self._head_caches = transformer.new_caches(batch)

    def read_condition(self, cond: Tensor) -> Tensor:
        """Read the condition [B, L]; returns the first position's context [B, E]."""
        return self._body(self.transformer.body_input.embed_condition(cond))

    def read_stack(self, stack: Tensor, position: int) -> Tensor:
        """Read the codes [B, D] of `position`; returns the next position's context [B, E]."""
        return self._body(self.transformer.body_input.embed_codes(stack.unsqueeze(1), position))

    def next_logits(self, context: Tensor, drawn: Tensor) -> Tensor:
        """Logits of depth d, fp32 [B, K_d], given a position's context [B, E] and its codes so far [B, d]."""
        model, depth = self.transformer, drawn.shape[-1]
        if depth == 0:
            for cache in self._head_caches:
                cache.reset()
        hidden = model.head_input.embed_step(context, drawn)  # [B, 1, E]
        for block, cache in zip(model.head.values(), self._head_caches, strict=True):
            hidden = block(hidden, cache)
        logits = gather_from(model.outputs.codes(hidden, slice(depth, depth + 1)), model.tp)  # [B, 1, K]
        return logits[:, 0, : model.config.sizes[depth]].float()

    def _body(self, hidden: Tensor) -> Tensor:
        for block, cache in zip(self.transformer.body.values(), self._body_caches, strict=True):
            hidden = block(hidden, cache)
        return hidden[:, -1]


@torch.no_grad()
def walk(transformer: RQTransformer, cond: Tensor, choose: Choose, progress: Progress | None = None) -> Tensor:
    """Stacks [B, H, W, D] for conditions [B, L], each code picked by `choose` from the logits at its place.

    Dropout is off, whatever the model's mode. Raises ConfigError where the model's answers are not finite.
    """
    height, width, depths = transformer.config.code_shape
    codes = cond.new_zeros(len(cond), height * width, depths)
    with _evaluating(transformer):
        forward = CachedForward(transformer, len(cond))
        context = forward.read_condition(cond)
        finite = context.isfinite().all()
        for position in range(height * width):
            if position:
                context = forward.read_stack(codes[:, position - 1], position - 1)
                finite = finite & context.isfinite().all()
            for depth in range(depths):
                logits = forward.next_logits(context, codes[:, position, :depth])
                codes[:, position, depth] = choose(logits, position, depth)
            if progress is not None:
                progress(len(cond))
    if not finite:
        raise ConfigError(
            f"the model's hidden states are not finite in {transformer.body_input.positions.dtype}: its weights are "
            "damaged, or too large for float16. Use dtype bfloat16 or float32."
        )
    return codes.unflatten(1, (height, width))


def sample_codes(
    transformer: RQTransformer,
    cond: Tensor,
    top_k: Counts = None,
    top_p: Shares = 1.0,
    temperature: Shares = 1.0,
    seed: int = 0,
    *,
    indices: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Draw one stack of codes for each condition.

    Args:
        transformer: with weights and codebook loaded.
        cond: int64 [B, L] caption tokens or [B, 1] classes; zeros [B, 1] where the model has no condition.
        top_k: draw among the k likeliest codes: one value, or one for each depth; None for all.
        top_p: among the likeliest codes that hold this share of the probability: one value, or one for each depth.
        temperature: divides the logits: one value, or one for each depth.
        seed: with a picture's index, all that is random about it.
        indices: the pictures' indices [B]; 0, 1, .. by default.
        progress: called after each position with B.

    Returns:
        int64 [B, H, W, D], on the transformer's device.

    Raises:
        ConfigError: a condition or setting that the model cannot take.
    """
    settings = depth_settings(transformer.config.sizes, top_k, top_p, temperature)
    seed = check_seed(seed)
    cond = check_condition(transformer, cond)
    indices = range(len(cond)) if indices is None else indices
    if len(indices) != len(cond):
        raise ConfigError(f"{len(indices)} indices for {len(cond)} conditions: give one for each.")
    uniform = torch.stack([_uniform(transformer, seed, index) for index in indices]).to(cond.device)  # [B, T, D]

    def choose(logits: Tensor, position: int, depth: int) -> Tensor:
        return settings[depth].draw(logits, uniform[:, position, depth])

    return walk(transformer, cond, choose, progress)


def _uniform(transformer: RQTransformer, seed: int, index: int) -> Tensor:
    shape = (transformer.config.positions, transformer.config.depth)
    return torch.rand(shape, generator=named_generator(seed, "picture", int(index)), dtype=torch.float64)


def check_condition(transformer: RQTransformer, cond: Tensor) -> Tensor:
    """The condition as int64 [B, L] on the model's device. Raises ConfigError where the model cannot read it."""
    config = transformer.config
    if cond.is_floating_point() or cond.dtype == torch.bool or cond.ndim not in (1, 2) or not len(cond):
        raise ConfigError(
            f"cond is {cond.dtype} {list(cond.shape)}: give whole numbers [B, {config.cond_length}], one row a picture."
        )
    device = transformer.body_input.positions.device
    cond = transformer.fill_condition(cond.to(device, torch.int64), len(cond))
    low, high = int(cond.min()), int(cond.max())
    if low < 0 or high >= config.cond_vocab_size:
        raise ConfigError(
            f"cond holds {low if low < 0 else high}: this model's {config.condition} condition goes from 0 to "
            f"{config.cond_vocab_size - 1}. Give numbers in this range."
        )
    return cond


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
