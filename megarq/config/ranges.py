"""What numbers a key may have: said once, in the words of the error message."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from megarq.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """An interval of numbers."""

    low: float
    high: float = inf
    open_low: bool = False
    """Whether `low` itself is outside."""
    open_high: bool = False
    """Whether `high` itself is outside."""

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.open_low else f"of {self.low:g} or more"
        high = "" if self.high == inf else f" and {'below' if self.open_high else 'at most'} {self.high:g}"
        return f"a number {low}{high}"


COUNT = Range(1)
"""Of things that there must be."""
AMOUNT = Range(0)
"""Of things that there may be none of."""
POSITIVE = Range(0, open_low=True)
SHARE = Range(0, 1)
RATE = Range(0, 1, open_high=True)
"""Of dropout, and of decay."""


def check_ranges(section: str, config: object, **ranges: Range) -> None:
    """Raise ConfigError naming the first field whose value, or an element of it, is out of its range; None passes."""
    for name, allowed in ranges.items():
        value = getattr(config, name)
        for number in value if isinstance(value, Sequence) else [value]:
            if number is not None and number not in allowed:
                raise ConfigError(f"{section}.{name}={value}: use {allowed}.")
