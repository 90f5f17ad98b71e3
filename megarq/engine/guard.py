"""What a step's numbers mean for the run: go on, skip the step, or go back to the last checkpoint."""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median

from megarq.config.faults import FaultConfig

_WINDOW = 128
"""Steps over which a loss is usual."""


class Guard:
    """Looks at each step; given the same on all ranks, its verdicts are the same."""

    def __init__(self, config: FaultConfig, skippable: bool) -> None:
        """`skippable` says that a step which the optimiser did not make leaves the model as it was."""
        self._config, self._skippable = config, skippable
        self._skipped, self._spiking = 0, 0
        self._usual: deque[float] = deque(maxlen=_WINDOW)

    def forget(self) -> None:
        """Start anew, after the run went back."""
        self._skipped, self._spiking = 0, 0
        self._usual.clear()

    def look(self, wrong: str | None, loss: float, applied: bool) -> tuple[str | None, bool]:
        """(what is wrong with a step or None, whether the run must go back).

        Args:
            wrong: which number of the step is not finite, None where all are.
            loss: of the step.
            applied: whether the optimiser made the step.
        """
        if wrong is not None:
            self._skipped += 1
            return wrong, applied or not self._skippable or self._skipped > self._config.skipped_steps
        self._skipped = 0
        return self._look_for_spikes(loss)

    def _look_for_spikes(self, loss: float) -> tuple[str | None, bool]:
        factor = self._config.spike_factor
        if factor is None:
            return None, False
        if len(self._usual) == _WINDOW and loss > factor * median(self._usual):
            self._spiking += 1
            if self._spiking >= self._config.spike_steps:
                usual = f"{factor:g} times its median {median(self._usual):.4g}"
                return f"loss {loss:.4g} after {self._spiking} steps above {usual}", True
            return None, False
        self._spiking = 0
        self._usual.append(loss)
        return None, False


def not_finite(values: Mapping[str, float]) -> str | None:
    """Which losses, or the gradient's norm, are not finite numbers; None where all are."""
    # Where the engine does not look for overflows, -1 is the norm of a gradient that is not finite.
    named = {name: math.inf if name == "grad_norm" and value < 0 else value for name, value in values.items()}
    wrong = [f"{name} is {value:g}" for name, value in named.items() if not math.isfinite(value)]
    return ", ".join(wrong) or None
