"""What a run does where something goes wrong while it trains."""

from dataclasses import dataclass

from megarq.config.ranges import AMOUNT, COUNT, Range, check_ranges


@dataclass
class FaultConfig:
    """When a run skips a step, goes back to its last checkpoint, warns, or ends."""

    hang_seconds: float = 600
    """Seconds without progress in a step after which a rank ends itself, and the rank that hangs is named; ten times
    that before and in the first step, in validations, pictures and checkpoints. 0: never, but that collectives give up
    after two hours."""
    skipped_steps: int = 3
    """Steps in a row whose loss or gradient is not finite, which are skipped, before the run goes back to its last
    checkpoint; the samples since then are not seen again. An RQ-VAE, whose codebook such a step spoils, goes back at
    once."""
    rollbacks: int = 3
    """Times that the run goes back without a new checkpoint between them; then it ends."""
    spike_factor: float | None = None
    """Go back where the loss is above so many times its median over the 128 steps before; null: never."""
    spike_steps: int = 10
    """Steps in a row that it must be so."""
    replicas_every: int = 1000
    """Steps between comparisons of what must be the same on several ranks, by checksum, besides one before every
    checkpoint; 0 turns both off. Where ranks differ, the run goes back."""
    probe_every: int = 100
    """Steps between probes of each rank's own speed, by a product of matrices; 0: never."""
    slow_factor: float = 1.5
    """Warn of a rank whose probe takes so many times the median of all ranks, twice in a row."""

    def validate(self) -> None:
        """Raise ConfigError where a value cannot be run."""
        above = Range(1, open_low=True)
        amounts = dict.fromkeys(("hang_seconds", "skipped_steps", "rollbacks", "replicas_every", "probe_every"), AMOUNT)
        check_ranges("faults", self, **amounts, spike_steps=COUNT, spike_factor=above, slow_factor=above)
