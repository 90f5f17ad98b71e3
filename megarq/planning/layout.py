"""How a run is laid out over ranks, as far as memory, communication and time depend on it."""

from dataclasses import dataclass

from megarq.parallel.topology import Topology


@dataclass(frozen=True)
class Layout:
    """One way to train: degrees of parallelism, ZeRO's stage, and what is recomputed, offloaded or kept."""

    tp: int
    """Tensor-parallel size."""
    pp: int
    """Pipeline-parallel size."""
    dp: int
    """Data-parallel size."""
    zero: int
    """ZeRO's stage, 1 to 3."""
    sequence: bool = False
    """Sequence parallelism: between blocks a tensor rank holds a slice of the tokens."""
    micro_batch: int = 1
    """Samples a rank holds at once."""
    accumulation: int = 1
    """Micro-batches in an optimiser step."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations."""
    precision: str = "bf16"
    """"bf16" (fp32 master weights) or "fp32"."""
    offload_optimizer: bool = False
    """Master weights and moments in the host's memory."""
    offload_parameters: bool = False
    """ZeRO-3's partitions in the host's memory."""
    ema: bool = False
    """Keep a moving average of the weights."""

    @property
    def bytes_each(self) -> int:
        """Bytes of a number in the training precision."""
        return 2 if self.precision == "bf16" else 4

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.tp * self.pp * self.dp

    def topology(self, rank: int) -> Topology:
        """Where a rank stands."""
        return Topology(self.world, rank, self.tp, self.pp)
