"""The learning rate as a function of the step."""

from math import cos, pi

from megarq.config.run import TrainConfig
from megarq.errors import ConfigError


def learning_rate(step: int, total: int, warmup: int, config: TrainConfig, joined: int = 0) -> float:
    """Rate of update `step` (0-based) of `total`: linear from 0 in the first `warmup`, then cosine to 0 or constant.

    What joins the run in update `joined` has a warm-up of its own, under the same cosine.
    """
    peak = config.lr * min(1.0, (step - joined + 1) / max(1, warmup))
    if step < warmup or config.schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + cos(pi * progress))


def run_length(config: TrainConfig, samples: int) -> tuple[int, int]:
    """Optimiser steps in all and of warm-up, for a data set of so many samples.

    Raises: ConfigError for a batch that would hold samples twice.
    """
    if config.global_batch_size > samples:
        raise ConfigError(
            f"train.global_batch_size={config.global_batch_size}: --data holds {samples} samples, less than a batch. "
            f"Use {samples} or less, or more data."
        )
    per_epoch = samples / config.global_batch_size
    steps = config.steps if config.steps is not None else max(1, round((config.epochs or 0) * per_epoch))
    return steps, config.warmup_steps + round(config.warmup_epochs * per_epoch)
