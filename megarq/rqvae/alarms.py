"""What goes wrong in the training of an RQ-VAE, told from its metrics.

An alarm is a function of the lines of metrics.jsonl alone: a run that goes on sees the lines of before again, and knows
its best values. Each alarm speaks once, and again only after it has cleared.
"""

import math
from collections.abc import Mapping
from typing import Any

from megarq.config.run import HealthConfig

_CLEARED = 0.1
"""How far inside its threshold, in units of it, a value must be again: one that trembles on it speaks once."""
_LOGITS = {"hinge": 1.0, "vanilla": 4.0}
"""Beyond these a patch adds nothing to the hinge loss, and almost nothing (1.8%) to the vanilla one."""


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

    def __init__(self, config: HealthConfig, adversarial: str) -> None:
        """`adversarial` is the discriminator's loss, hinge or vanilla."""
        self._config = config
        self._rise = math.inf if config.reconstruction_rise is None else config.reconstruction_rise
        self._logits_bound = _LOGITS[adversarial] if config.logits is None else config.logits
        self._best_usage: dict[str, float] = {}
        self._usage_alarms: dict[str, Alarm] = {}
        self._best_reconstruction = math.inf
        self._reconstruction = Smoothed(config.smoothing)
        self._real, self._fake = Smoothed(config.smoothing), Smoothed(config.smoothing)
        self._undefined, self._risen, self._saturated = Alarm(), Alarm(), Alarm()

    def see(self, values: Mapping[str, Any]) -> list[str]:
        """What to warn of after a step with these metrics; numbers that are not known are None or missing."""
        if "reconstruction_loss" not in values:  # a line of a validation
            return []
        warnings = [self._see_usage(name, values[name]) for name in values if name.startswith("usage_")]
        warnings.append(self._see_reconstruction(values["reconstruction_loss"]))
        warnings.append(self._see_logits(values.get("logits_real"), values.get("logits_fake")))
        return [warning for warning in warnings if warning is not None]

    def _see_usage(self, name: str, usage: float) -> str | None:
        best = self._best_usage[name] = max(usage, self._best_usage.get(name, 0.0))
        alarm = self._usage_alarms.setdefault(name, Alarm())
        lost, allowed = (1 - usage / best if best else 0.0), 1 - self._config.usage_floor
        if not alarm.rings(lost, allowed):
            return None
        return (
            f"{usage:.0%} of the codes are used at depth {name.removeprefix('usage_')}, {best:.0%} were at best: the "
            "codebook collapses. Lower train.lr, or start anew with codebook.init=kmeans"
        )

    def _see_reconstruction(self, loss: float | None) -> str | None:
        if loss is None or not math.isfinite(loss):
            if self._undefined.rings(1.0, 0.5):
                return "reconstruction_loss is not a number: go back to an earlier checkpoint, with a lower train.lr"
            return None
        self._undefined.rings(0.0, 0.5)
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

    def _see_logits(self, real: float | None, fake: float | None) -> str | None:
        if real is None or fake is None or not (math.isfinite(real) and math.isfinite(fake)):
            return None
        smooth_real, smooth_fake = self._real.add(real), self._fake.add(fake)
        if smooth_real is None or smooth_fake is None:
            return None
        if not self._saturated.rings(min(smooth_real, -smooth_fake), self._logits_bound):
            return None
        return (
            f"the discriminator's logits are {smooth_real:.2f} for real pictures and {smooth_fake:.2f} for "
            "reconstructed ones on average: it is too sure to learn or to teach. Lower loss.discriminator_lr"
        )
