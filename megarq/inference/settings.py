"""How codes are drawn: the settings of each depth, checked, and the draw itself.

Shapes: B batch, K codebook size.
"""

import importlib.util
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megarq.config.run import MOST_GUIDANCE
from megarq.errors import ConfigError

Counts = int | Sequence[int | None] | None
Shares = float | Sequence[float]

_TRITON = importlib.util.find_spec("triton") is not None
_COOLEST = 1e-6
_NUCLEUS = 256
"""Codes that top-p alone is first looked for in."""


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
        """Codes [B] for fp32 logits [B, K] and fp64 numbers [B] in [0, 1), which stand on the cumulated distribution.

        Codes are cumulated in the order of their indices. On a GPU with Triton one kernel does all of it.
        """
        if self.top_k == 1:
            return logits.argmax(-1)
        if logits.is_cuda and _TRITON:
            from megarq.inference.draw_kernel import draw  # needs Triton

            return draw(logits, uniform, self.top_k, self.top_p, self.temperature)
        weights = ((logits - logits.amax(-1, keepdim=True)) / self.temperature).softmax(-1)
        if self.top_k < weights.shape[-1] or self.top_p < 1:
            weights = self._filtered(weights)
        cumulated = weights.cumsum(-1, dtype=torch.float64)
        total = cumulated[..., -1:]
        # Strictly below the total, rounding included, so that no code of probability 0 is drawn.
        target = torch.minimum(uniform.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
        codes = torch.searchsorted(cumulated, target, right=True).squeeze(-1)
        return codes.clamp(max=logits.shape[-1] - 1)  # logits that are not finite, which the sampler reports

    def _filtered(self, weights: Tensor) -> Tensor:
        """Probabilities [B, K] with those that top-k, then top-p leave out set to 0."""
        size = weights.shape[-1]
        # For top-p alone no more codes are sorted than reach it; a GPU, which would have to be waited for, sorts all.
        count = self.top_k if self.top_k < size or weights.is_cuda else min(_NUCLEUS, size)
        likeliest, codes = weights.topk(count, dim=-1)  # falling
        cumulated = likeliest.cumsum(-1, dtype=torch.float64)
        total = cumulated[..., -1:] if count == self.top_k else weights.sum(-1, keepdim=True, dtype=torch.float64)
        while count < self.top_k and not (cumulated[..., -1:] > self.top_p * total).all():
            count = min(4 * count, size)
            likeliest, codes = weights.topk(count, dim=-1)
            cumulated = likeliest.cumsum(-1, dtype=torch.float64)
        before = (cumulated - likeliest) / total
        kept = likeliest.masked_fill(before >= self.top_p, 0)
        return torch.zeros_like(weights).scatter_(-1, codes, kept)


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


def check_guidance(value: Any, condition: str) -> float:
    """The scale as a float. Raises ConfigError where it is out of range, or the condition has no null."""
    scale = _number(value)
    if not 0 <= scale <= MOST_GUIDANCE:
        raise ConfigError(
            f"guidance={value!r}: give a number from 0 to {MOST_GUIDANCE:g}; 1 is none, and 2 to 8 stress the caption."
        )
    if scale != 1 and condition != "text":
        raise ConfigError(
            f"guidance={value!r}: the model's condition is {condition}, and only captions have a null condition, the "
            "empty caption. Use guidance 1."
        )
    return scale


def check_seed(seed: Any) -> int:
    """The seed as an int. Raises ConfigError for anything that is not a whole number."""
    try:
        if not isinstance(seed, bool):
            return operator.index(seed)
    except TypeError:
        pass
    raise ConfigError(f"seed={seed!r}: give a whole number, such as 0.")
