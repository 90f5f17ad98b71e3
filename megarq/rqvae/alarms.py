"""What goes wrong in the training of an RQ-VAE, told from its metrics.

An alarm is a function of the lines of metrics.jsonl alone: a run that goes on sees the lines of before again, and knows
its best values. Each alarm speaks once, and again only after it has cleared.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megarq.config.run import HealthConfig
from megarq.rqvae.losses import LARGEST_WEIGHT

_CLEARED = 0.1
"""How far inside its threshold, in units of it, a value must be again: one that trembles on it speaks once."""
_AT_LARGEST = 0.9
"""Lambda sits at its clamp where its mean is above this share of it."""
_LOGITS = {"hinge": 1.0, "vanilla": 4.0}
"""Beyond these a patch adds nothing to the hinge loss, and almost nothing (1.8%) to the vanilla one."""
_COLLAPSES = "the codebook collapses. Lower train.lr, or start anew with codebook.init=kmeans"


class Alarm:
    """Remembers whether it has spoken."""

    def __init__(self) -> None:
        self._on = False

    def rings(self, value: float, threshold: float) -> bool:
        """Whether to speak now: `value` has come above a positive threshold for the first time since it cleared."""
        before = self._on
        self._on = value > threshold * (1 - _CLEARED) if before else value > threshold
        return self._on and not before


class Smoothed:
    """A moving average that knows when it is one."""

    def __init__(self, steps: int) -> None:
        """`steps` is how far it looks back, and how many values it waits for."""
        self._steps, self._keep = steps, 1 - 1 / steps
        self._sum, self._weight, self._seen = 0.0, 0.0, 0

    def add(self, value: float) -> float | None:
        """The average with one more value; None before there are enough."""
        self._sum = self._keep * self._sum + (1 - self._keep) * value
        self._weight = self._keep * self._weight + (1 - self._keep)
        self._seen += 1
        return self._sum / self._weight if self._seen >= self._steps else None


class Alarms:
    """All alarms of a run."""

    def __init__(self, config: HealthConfig, adversarial: str, sizes: Sequence[int]) -> None:
        """`adversarial` is the discriminator's loss, hinge or vanilla; `sizes` are the codebook sizes of the depths."""
        self._config, self._sizes = config, sizes
        self._rise = math.inf if config.reconstruction_rise is None else config.reconstruction_rise
        self._logits_bound = _LOGITS[adversarial] if config.logits is None else config.logits
        self._best_usage: dict[str, float] = {}
        self._best_perplexity: dict[str, float] = {}
        self._usage_alarms: dict[str, Alarm] = {}
        self._perplexity_alarms: dict[str, Alarm] = {}
        self._best_reconstruction = math.inf
        self._reconstruction = Smoothed(config.smoothing)
        self._joined = False
        self._real, self._fake = Smoothed(config.smoothing), Smoothed(config.smoothing)
        self._lambda = Smoothed(config.smoothing)
        self._risen, self._saturated, self._clamped = Alarm(), Alarm(), Alarm()

    def see(self, values: Mapping[str, Any]) -> list[str]:
        """What to warn of after a step with these metrics; numbers that are not known are None or missing."""
        if values.get("reconstruction_loss") is None:  # a line of a validation
            return []
        warnings: list[str | None] = []
        shared = "usage" in values
        for depth in [name.removeprefix("usage") for name in values if name.startswith("usage")]:
            sharing = shared and depth != ""
            if not sharing:
                warnings.append(self._see_usage(depth, values[f"usage{depth}"]))
            warnings.append(self._see_perplexity(depth, values[f"perplexity{depth}"], sharing))
        real, fake = values.get("logits_real"), values.get("logits_fake")
        self._see_discriminator(real is not None)
        warnings.append(self._see_reconstruction(values["reconstruction_loss"]))
        if real is not None and fake is not None:
            warnings.append(self._see_logits(real, fake))
            warnings.append(self._see_lambda(values["adaptive_weight"]))
        return [warning for warning in warnings if warning is not None]

    def _see_usage(self, depth: str, usage: float) -> str | None:
        best = self._best_usage[depth] = max(usage, self._best_usage.get(depth, 0.0))
        alarm = self._usage_alarms.setdefault(depth, Alarm())
        lost, allowed = (1 - usage / best if best else 0.0), 1 - self._config.usage_floor
        if not alarm.rings(lost, allowed):
            return None
        return f"{usage:.0%} of the codes are used{_at(depth)}, {best:.0%} were at best: {_COLLAPSES}"

    def _see_perplexity(self, depth: str, perplexity: float, sharing: bool) -> str | None:
        """Of a codebook; or of a depth that shares one with others, which is held against its own best."""
        if depth not in self._best_perplexity:  # the first look is at a codebook that is still finding its place
            self._best_perplexity[depth] = 0.0
            return None
        best = self._best_perplexity[depth] = max(perplexity, self._best_perplexity[depth])
        size = self._sizes[int(depth.removeprefix("_") or 1) - 1]
        floor = self._config.perplexity_floor * (best if sharing else size)
        if not self._perplexity_alarms.setdefault(depth, Alarm()).rings(floor / perplexity, 1.0):
            return None
        held_against = f"{best:.1f} at best" if sharing else f"below {floor:.1f}"
        return f"the perplexity of the {size} codes is {perplexity:.1f}{_at(depth)}, {held_against}: {_COLLAPSES}"

    def _see_discriminator(self, present: bool) -> None:
        """The reconstruction that a new discriminator pulls at is no longer held against what it was without one."""
        if present and not self._joined:
            self._reconstruction, self._best_reconstruction = Smoothed(self._config.smoothing), math.inf
        self._joined = present

    def _see_reconstruction(self, loss: float) -> str | None:
        smoothed = self._reconstruction.add(loss)
        if smoothed is None:
            return None
        best = self._best_reconstruction = min(smoothed, self._best_reconstruction)
        if not self._risen.rings(smoothed, self._rise * best):
            return None
        return (
            f"reconstruction_loss is {smoothed:.3g} on average, it was {best:.3g} at best: it diverges. Lower train.lr "
            "or loss.adversarial_weight, from an earlier checkpoint"
        )

    def _see_logits(self, real: float, fake: float) -> str | None:
        smooth_real, smooth_fake = self._real.add(real), self._fake.add(fake)
        if smooth_real is None or smooth_fake is None:
            return None
        if not self._saturated.rings(smooth_real - smooth_fake, 2 * self._logits_bound):
            return None
        return (
            f"the discriminator's logits are {smooth_real:.2f} for real pictures and {smooth_fake:.2f} for "
            "reconstructed ones on average: it is too sure to learn or to teach. Lower loss.discriminator_lr"
        )

    def _see_lambda(self, weight: float) -> str | None:
        smoothed = self._lambda.add(weight)
        if smoothed is None or not self._clamped.rings(smoothed, _AT_LARGEST * LARGEST_WEIGHT):
            return None
        return (
            f"adaptive_weight is {smoothed:.0f} on average, and clamped at {LARGEST_WEIGHT:.0f}: the discriminator "
            "gives the reconstruction no gradient. Lower loss.discriminator_lr"
        )


def _at(depth: str) -> str:
    """Where, in words, from the ending of a name."""
    return f" at depth {depth.removeprefix('_')}" if depth else ""
