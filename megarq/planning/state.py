"""Bytes of a rank's state, exactly as DeepSpeed 0.19.8 holds it: what stays in memory from step to step.

For a shard of n numbers over dp data-parallel ranks, before padding (b: bytes of a number, 2 in bf16 and 4 in fp32):

                     ZeRO-1            ZeRO-2             ZeRO-3
    parameters       b n               b n                b n / dp, and small ones whole
    masters          4 n / dp          4 n / dp           4 n / dp
    moments          8 n / dp          8 n / dp           8 n / dp
    gradients bf16   4 n + 2 n         4 n / dp           4 n / dp
    gradients fp32   4 n (see below)   4 n / dp           4 n / dp

ZeRO-1 in bf16 keeps fp32 sums of all gradients beside the bf16 ones that backward passes write into. ZeRO-1 in fp32
keeps all gradients between the micro-batches of a step; without accumulation, only those of the parameters that its
part touches, like ZeRO-2. Buckets of gradients under way and parameters gathered for a moment are not state.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megarq.planning.layout import Layout
from megarq.planning.sharding import Shard, Sharding

FP32, BF16 = 4, 2
PARTS = ("parameters", "masters", "moments", "gradients", "ema", "buffers", "staging")
"""Of a rank's state."""
PERSISTENCE_THRESHOLD = 100_000
"""ZeRO-3 keeps parameters of up to this many numbers whole on all ranks (stage3_param_persistence_threshold)."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank's state, by part."""

    parameters: int
    """What the layers compute with."""
    masters: int
    """fp32 weights that the optimiser moves."""
    moments: int
    """Adam's two moments, and its step count beside each flat tensor."""
    gradients: int
    """At their largest after a backward pass."""
    ema: int
    """Moving average of the weights."""
    buffers: int
    """Frozen codebooks."""
    staging: int
    """Through which gradients go to an offloaded optimiser and weights come back."""
    on_host: Mapping[str, int]
    """Of all these, those in the host's memory, by part."""

    def on_device(self, *parts: str) -> int:
        """Of some parts, those on the device."""
        return sum(getattr(self, part) - self.on_host[part] for part in parts)

    @property
    def device(self) -> int:
        """On the device."""
        return self.on_device(*PARTS)

    @property
    def host(self) -> int:
        """In the host's memory."""
        return sum(self.on_host.values())

    @property
    def total(self) -> int:
        """On the device and the host together."""
        return self.device + self.host


def state_bytes(
    shard: Shard, sharding: Sharding, layout: Layout, data_rank: int, persistence: int = PERSISTENCE_THRESHOLD
) -> StateBytes:
    """State of the rank `data_rank` among those that hold a shard; `persistence` is ZeRO-3's threshold."""
    flat = sum(sharding.flats)
    cut, whole = _parameters(sharding, layout, persistence)
    gradients, gradients_on_host = _gradients(sharding, layout, data_rank)
    staging, staging_on_host = _staging(sharding, layout)
    masters, moments = FP32 * flat, 2 * FP32 * flat + FP32 * len(sharding.flats)
    ema = FP32 * int(sharding.length[:, data_rank].sum()) if layout.ema else 0
    return StateBytes(
        parameters=cut + whole,
        masters=masters,
        moments=moments,
        gradients=gradients,
        ema=ema,
        buffers=shard.buffer_bytes,
        staging=staging,
        on_host={
            "parameters": cut * layout.offload_parameters,
            "masters": masters * layout.offload_optimizer,
            "moments": moments * layout.offload_optimizer,
            "gradients": gradients_on_host,
            "ema": ema * layout.offload_optimizer,
            "buffers": 0,
            "staging": staging_on_host,
        },
    )


def _parameters(sharding: Sharding, layout: Layout, persistence: int) -> tuple[int, int]:
    """Bytes in ZeRO-3's partitions, and of parameters held whole."""
    each, flat = layout.bytes_each, sum(sharding.flats)
    if layout.zero < 3:
        return 0, each * flat * layout.dp
    small = int(sharding.sizes[sharding.sizes <= persistence].sum())
    return each * flat, each * small if layout.dp > 1 else 0  # a lone rank computes with the partition itself


def _gradients(sharding: Sharding, layout: Layout, data_rank: int) -> tuple[int, int]:
    """In all, and of these in the host's memory."""
    flat, numel = sum(sharding.flats), int(sharding.sizes.sum())
    offload, fp32 = layout.offload_optimizer, layout.precision == "fp32"
    if layout.zero == 3:  # offloaded: the sums, and a copy beside the masters
        return (2 * FP32 * flat,) * 2 if offload else (FP32 * flat, 0)
    if layout.zero == 1 and not fp32 and not offload:
        return FP32 * flat * layout.dp + BF16 * numel, 0
    touched = FP32 * int(sharding.sizes[sharding.length[:, data_rank] > 0].sum())
    padding = FP32 * (flat - int(sharding.length[:, data_rank].sum()))
    host = FP32 * flat if offload else 0
    if fp32 and offload and layout.zero == 2 and layout.accumulation > 1:
        host += touched
    if layout.zero == 1 and (layout.accumulation > 1 or layout.pp > 1):
        device = FP32 * numel
    elif fp32:
        device = 0 if offload else touched + padding
    else:
        device = FP32 * flat
    return device + host, host


def _staging(sharding: Sharding, layout: Layout) -> tuple[int, int]:
    """In all, and of these in the host's memory; ZeRO-3 goes without."""
    if not layout.offload_optimizer or layout.zero == 3:
        return 0, 0
    flat, largest = sum(sharding.flats), int(sharding.sizes.max())
    return layout.bytes_each * (flat + 2 * largest), layout.bytes_each * (flat + largest)
