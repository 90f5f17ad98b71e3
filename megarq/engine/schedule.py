"""The learning rate as a function of the step."""

from math import cos, pi

from megarq.config.run import TrainConfig


def learning_rate(step: int, total: int, warmup: int, config: TrainConfig) -> float:
    """Rate of update `step` (0-based) of `total`: linear from 0 in the first `warmup`, then cosine to 0 or constant."""
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(1, total - warmup)
    return config.lr * 0.5 * (1 + cos(pi * progress))


def run_length(config: TrainConfig, samples: int) -> tuple[int, int]:
    """Optimiser steps in all and of warm-up, for a data set of so many samples."""
    per_epoch = samples / config.global_batch_size
    steps = config.steps if config.steps is not None else max(1, round((config.epochs or 0) * per_epoch))
    return steps, config.warmup_steps + round(config.warmup_epochs * per_epoch)
