"""Memory, communication and time of one layout, from counts and a few stated speeds.

The time of a micro-batch in a pipeline stage, forward and backward:

    products    FLOPs / (peak x efficiency), but no less than reading the stage's weights takes; the backward pass is
                two forward passes, and one more where activations are recomputed
    sums        adding the gradients to fp32 sums moves memory and adds to the backward pass
    tensor      what cannot hide behind the weights' gradients adds to it
    pipeline    what is sent adds to it
    ZeRO-2, 3   gathers and reductions run beside: the longer of the two counts, forward and backward on their own

An optimiser step of m micro-batches by 1F1B takes (m - 1) times that of the slowest stage and once the sum of all, then
what no product runs beside: ZeRO-1's reduction of gradients, AdamW, and the gather of updated parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megarq.config.run import RQTransformerRunConfig
from megarq.planning.activations import (
    FP32,
    activation_bytes,
    held_micro_batches,
    loss_in_parts,
    working_bytes,
)
from megarq.planning.communication import (
    Links,
    gradient_bytes,
    parameter_bytes,
    pipeline_bytes,
    tensor_traffic,
)
from megarq.planning.flops import layer_flops
from megarq.planning.layout import Layout
from megarq.planning.layouts import shipped_ds_config
from megarq.planning.sharding import Shard
from megarq.planning.state import StateBytes

GIB = 2**30
BLOCKS = ("body.", "head.")
"""How the names of blocks, and of their parameters, begin."""
REDUCED_AT_ONCE = 500_000_000
"""Gradients that ZeRO-1 in bf16 copies to reduce them: DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE."""


@dataclass(frozen=True)
class Machine:
    """What the GPUs are assumed to be."""

    gpus: int
    """GPUs in all."""
    links: Links
    """Between them."""
    memory: float
    """Bytes of one GPU."""
    reserve: float
    """Bytes of it kept free: CUDA context, NCCL's buffers, the frozen RQ-VAE, fragmentation."""
    peak: float
    """FLOP/s of one GPU, dense, in the training precision."""
    efficiency: float
    """Share of the peak that matrix products and what lies between them reach."""
    memory_bandwidth: float
    """Bytes per second that one GPU reads or writes."""


@dataclass(frozen=True)
class Estimate:
    """What a layout needs and does."""

    layout: Layout
    """The layout."""
    memory: Mapping[str, float]
    """Bytes by kind on the GPU of the fullest rank."""
    stage: int
    """The pipeline stage of that rank."""
    communication: Mapping[str, int]
    """Bytes that a rank sends in a step, by kind; the most of any stage."""
    seconds: Mapping[str, float]
    """A step's time by part; they add up."""
    balance: float
    """FLOPs of the largest stage over the mean."""
    host: int
    """Bytes that the fullest rank keeps in the host's memory besides."""

    @property
    def needed(self) -> float:
        """Bytes of the fullest rank, on its GPU."""
        return sum(self.memory.values())

    @property
    def bubble(self) -> float:
        """Share of a step in which an even pipeline waits: (pp - 1) / (m + pp - 1)."""
        waits = self.layout.pp - 1
        return waits / (self.layout.accumulation + waits)

    @property
    def step(self) -> float:
        """Seconds of an optimiser step."""
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        """Of all GPUs together."""
        layout = self.layout
        return layout.micro_batch * layout.accumulation * layout.dp / self.step


@dataclass(frozen=True)
class StageCosts:
    """What a pipeline stage of some tensor-parallel size costs, whatever else a layout says."""

    layers: tuple[str, ...]
    """Names of its layers."""
    parameters: int
    """Numbers in a rank's parameters."""
    in_blocks: int
    """Those of its blocks."""
    flops: int
    """Forward, of one image, over all tensor ranks."""
    block_flops: int
    """Those of its blocks."""
    loss_flops: int
    """Those of its classifiers."""

    @classmethod
    def of(cls, config: RQTransformerRunConfig, shard: Shard) -> "StageCosts":
        """The costs of a shard."""
        flops = layer_flops(config.model)
        sizes = {parameter.name: parameter.numel for parameter in shard.parameters}
        return cls(
            shard.layers,
            sum(sizes.values()),
            sum(size for name, size in sizes.items() if name.startswith(BLOCKS)),
            sum(flops[name] for name in shard.layers),
            sum(flops[name] for name in shard.layers if name.startswith(BLOCKS)),
            sum(flops[name] for name in shard.layers if name == "outputs"),
        )


def estimate(
    config: RQTransformerRunConfig,
    layout: Layout,
    machine: Machine,
    stages: Sequence[StageCosts],
    states: Sequence[StateBytes],
) -> Estimate:
    """What a layout needs and does, given each stage and the state of a rank of it."""
    memory = [
        _memory(config, layout, stage, state, index)
        for index, (stage, state) in enumerate(zip(stages, states, strict=True))
    ]
    fullest = max(range(layout.pp), key=lambda index: sum(memory[index].values()))
    sent = [_sent(config, layout, stage) for stage in stages]
    flops = [stage.flops for stage in stages]
    return Estimate(
        layout,
        {**memory[fullest], "reserve": machine.reserve},
        fullest,
        {kind: max(stage[kind] for stage in sent) for kind in sent[0]},
        _seconds(config, layout, machine, stages),
        max(flops) * layout.pp / sum(flops),
        states[fullest].host,
    )


def _memory(
    config: RQTransformerRunConfig, layout: Layout, stage: StageCosts, state: StateBytes, index: int
) -> dict[str, float]:
    """Bytes on the GPU of a rank of stage `index`, by kind."""
    saved = held_micro_batches(layout, index) * activation_bytes(config, layout, stage.layers)
    activations = saved + working_bytes(config, layout, stage.layers)
    return {
        "parameters": state.on_device("parameters", "ema", "buffers"),
        "gradients": state.on_device("gradients"),
        "optimizer": state.on_device("masters", "moments"),
        "activations": activations,
        "buffers": _buffer_bytes(layout, stage.parameters, activations) + state.on_device("staging"),
    }


def _buffer_bytes(layout: Layout, parameters: int, activations: int) -> int:
    """Buckets that gradients are reduced in, with their copies, and ZeRO-3's gathered parameters.

    ZeRO-1 in bf16 copies what it reduces after the backward passes, when the activations are gone. ZeRO-2 fills buckets
    in the training precision, flattens one and casts it to fp32; ZeRO-3 and fp32 fill fp32 buckets and copy one.
    """
    if layout.zero == 1 and layout.precision == "bf16":
        return max(0, FP32 * min(parameters, REDUCED_AT_ONCE) - activations)
    zero = shipped_ds_config(layout)["zero_optimization"]
    bucket = zero["reduce_bucket_size"]
    copied = min(bucket, parameters)
    if layout.zero == 3:
        gathered = min(parameters, zero["stage3_max_live_parameters"]) * layout.bytes_each
        return FP32 * (bucket + copied) + (gathered if layout.dp > 1 or layout.offload_parameters else 0)
    each, buckets = layout.bytes_each, 2 if zero.get("overlap_comm") else 1
    return buckets * bucket * each + copied * (each + (FP32 if each < FP32 else 0))


def _sent(config: RQTransformerRunConfig, layout: Layout, stage: StageCosts) -> dict[str, int]:
    """Bytes that a rank of a stage sends in a step, by kind."""
    tensor = tensor_traffic(config, layout, stage.layers)
    return {
        "gradients": gradient_bytes(layout, stage.parameters),
        "parameters": parameter_bytes(layout, stage.parameters, stage.in_blocks),
        "tensor": layout.accumulation * (tensor.exposed + tensor.hidden),
        "pipeline": layout.accumulation * pipeline_bytes(config, layout, stage.layers),
    }


def _seconds(
    config: RQTransformerRunConfig, layout: Layout, machine: Machine, stages: Sequence[StageCosts]
) -> dict[str, float]:
    """A step's time by part."""
    computing = [_compute_seconds(config, layout, machine, stage) for stage in stages]
    lasting = [
        _micro_batch_seconds(config, layout, machine, stage, *times)
        for stage, times in zip(stages, computing, strict=True)
    ]
    micro_batches = layout.accumulation
    computed = micro_batches * sum(map(sum, computing)) / layout.pp
    passed = micro_batches * sum(lasting) / layout.pp
    most = max(stage.parameters for stage in stages)
    ring = machine.links.data(layout)
    return {
        "computing": computed,
        "communicating": passed - computed,
        "waiting for stages": (micro_batches - 1) * max(lasting) + sum(lasting) - passed,
        "reducing gradients": gradient_bytes(layout, most) / ring if layout.zero == 1 else 0.0,
        "AdamW": most / layout.dp * (7 * FP32 + layout.bytes_each) / machine.memory_bandwidth,
        "gathering parameters": parameter_bytes(layout, most, 0) / ring if layout.zero < 3 else 0.0,
    }


def _compute_seconds(
    config: RQTransformerRunConfig, layout: Layout, machine: Machine, stage: StageCosts
) -> tuple[float, float]:
    """Of a micro-batch in a stage, forward and backward."""
    again = stage.block_flops if layout.activation_checkpointing else 0
    again += stage.loss_flops if loss_in_parts(config, layout) else 0
    products = stage.flops * layout.micro_batch / layout.tp / (machine.peak * machine.efficiency)
    forward = max(products, stage.parameters * layout.bytes_each / machine.memory_bandwidth)
    summed = stage.parameters * _summing_bytes(layout) / machine.memory_bandwidth
    return forward, forward * (2 + again / max(stage.flops, 1)) + summed


def _summing_bytes(layout: Layout) -> float:
    """Moved for each parameter to add a micro-batch's gradients to fp32 sums: those read, the sums read and written.

    ZeRO-1 in bf16 does so after a lone micro-batch too; in fp32 the first one's gradients are the sums. ZeRO-2 and 3
    write all gradients into fp32 buckets, and add to the sums the part of them that is this rank's.
    """
    if layout.zero > 1:
        return layout.bytes_each + FP32 + 3 * FP32 / layout.dp
    added = layout.accumulation - (layout.precision == "fp32")
    return (layout.bytes_each + 2 * FP32) * added / layout.accumulation


def _micro_batch_seconds(
    config: RQTransformerRunConfig, layout: Layout, machine: Machine, stage: StageCosts, forward: float, backward: float
) -> float:
    """Of a micro-batch in a stage, with the communication that its products do not hide."""
    links = machine.links
    tensor = tensor_traffic(config, layout, stage.layers)
    exposed = tensor.exposed / links.inside / 2  # forward and backward alike
    hidden = max(0.0, tensor.hidden / links.inside - forward)  # gradients of weights take as long as a forward pass
    sends = pipeline_bytes(config, layout, stage.layers) / links.pipeline(layout)
    before = after = 0.0  # beside the forward pass and beside the backward pass, in a step
    if layout.zero == 3:
        before = parameter_bytes(layout, stage.parameters, 0) / 2
        after = parameter_bytes(layout, stage.parameters, stage.in_blocks) - before
    if layout.zero > 1:
        after += gradient_bytes(layout, stage.parameters)
    per_micro_batch = layout.accumulation * links.data(layout)
    forward = max(forward + exposed, before / per_micro_batch)
    return forward + max(backward + exposed + hidden, after / per_micro_batch) + sends
