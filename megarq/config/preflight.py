"""What a run checks before its first step."""

from dataclasses import dataclass

from megarq.config.ranges import POSITIVE, check_ranges


@dataclass
class PreflightConfig:
    """Whether all ranks are fit to train together, asked once a start."""

    enabled: bool = True
    """Compare the ranks' code, configuration, devices and clocks, and try their collectives, data and disk."""
    all_reduce_mib: float | None = None
    """MiB that the timed all_reduce sums; null: 256 on GPUs, 1 on CPUs."""
    min_bandwidth_gbs: float | None = None
    """End the run where the all_reduce over all ranks has less bus bandwidth, in GB/s; null: it is only told."""
    max_clock_skew_seconds: float = 1.0
    """Warn where a rank's clock is further than this from the median of the ranks."""

    def validate(self) -> None:
        """Raise ConfigError where a value cannot be run."""
        names = ("all_reduce_mib", "min_bandwidth_gbs", "max_clock_skew_seconds")
        check_ranges("preflight", self, **dict.fromkeys(names, POSITIVE))
