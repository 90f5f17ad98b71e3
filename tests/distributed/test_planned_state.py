"""The planner's state bytes, owners of numbers and checkpoint files are those of live engines, on every rank.

The live side walks an engine that trains: it asks torch which memory its tensors share, not DeepSpeed what it meant.
"""

import gc
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from live_engines import live_engine
from tiny_runs import BATCH, CPU, Batches, ds_config, tiny_config, tiny_rqvae
from torch import Tensor

from megarq.config.run import ParallelConfig, RQTransformerRunConfig
from megarq.data.order import LoaderState
from megarq.engine.pipeline import trained_module
from megarq.engine.state import EngineState
from megarq.engine.transformer_task import TransformerTask
from megarq.planning.dry_run import dry_run
from megarq.planning.layout import Layout
from megarq.planning.state import FP32, state_bytes

BUCKET = 40_000
"""Numbers in a bucket of gradients: room for all of the tiny model's. No tensor but a bucket is of this size."""
GRADIENTS = (
    "averaged_gradients",
    "all_grad_tensors",
    "grad_partitions_flat_buffer",
    "fp32_groups_gradients_flat",
    "accumulated_grads_in_cpu",
)
"""Where DeepSpeed's optimisers keep gradients, beside the parameters' own."""
STAGING = (
    "param_buffer_of_bit16_for_cpu_offload_groups",
    "temp_grad_buffer_for_cpu_offload",
    "temp_grad_buffer_for_gpu_offload",
)
SCALAR = 8
"""Bytes of a number that is alone, at most: counters and norms."""
STEP_COUNTS = 2 * 4
"""Bytes of Adam's counters, of which each of the two groups has one."""
Memory = dict[int, int]
"""Bytes of each piece of memory, by its address."""


@dataclass
class Held:
    """What one rank's engine was found to hold."""

    parts: dict[str, int]
    """Bytes, named as in StateBytes."""
    everything: int
    """Bytes of all tensors that came to life with the engine, but scalars, just before the last step; 0 unasked."""
    fragments: dict[str, tuple[Any, int]]
    """What the rank would write into a checkpoint: places, and how many numbers."""


def tensors_in(value: Any) -> Iterable[Tensor]:
    """All tensors in nested lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def memory_of(tensors: Iterable[Tensor | None]) -> Memory:
    """The memory behind the tensors, each piece once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr()}


def all_tensors() -> list[Tensor]:
    """Every tensor of this process."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]


def gradients_of(engine: Any) -> Memory:
    """Gradients, but for those in buckets."""
    optimizer = engine.optimizer
    held = [getattr(optimizer, name, None) for name in GRADIENTS]
    for parameter in trained_module(engine).parameters():
        held += [parameter.grad, getattr(parameter, "grad_accum", None)]
    held += [flat.grad for flat in optimizer.optimizer.state]
    return {place: size for place, size in memory_of(tensors_in(held)).items() if size != FP32 * BUCKET}


def held_by_a_rank(config: RQTransformerRunConfig, ds: dict[str, Any], look_at_everything: bool) -> Held:
    """Train two steps and look: at gradients before every forward pass and step, at the rest afterwards."""
    before = all_tensors() if look_at_everything else []
    engine, groups, resolved = live_engine(config, ds, config.parallel.tp)
    module, topology = trained_module(engine), groups.topology
    state = EngineState(engine, groups, config.train.ema_decay)
    task = TransformerTask(
        engine,
        module=module,
        config=config,
        rqvae=tiny_rqvae(),
        tokenizer=None,
        validation=None,
        groups=groups,
        device=CPU,
        samples_per_epoch=1000,
    )
    batch = next(iter(Batches(config, topology.data_rank, topology.dp, LoaderState())))
    others = [*before, *tensors_in(vars(batch)), *task._rqvae.parameters(), *task._rqvae.buffers()]
    gradients: list[int] = []
    everything = [0]

    def look(*_: Any) -> None:
        gradients.append(sum(gradients_of(engine).values()))

    def look_and_step(step: Any) -> None:
        look()
        if look_at_everything:
            fresh = memory_of(all_tensors()).items() - memory_of(others).items()
            everything.append(sum(size for _, size in fresh if size > SCALAR))
        step()

    module.register_forward_pre_hook(look)
    engine.optimizer.step = partial(look_and_step, engine.optimizer.step)
    count = resolved["gradient_accumulation_steps"]
    for _ in range(2):
        engine.train()
        task.passes.train(task.micro_batches(batch, count), [0] * count)
        state.update_ema()
    tensors = {key: (place, tensor.numel()) for key, (place, tensor) in state.tensors().items()}
    parts = {name: sum(memory.values()) for name, memory in states_of(engine, state).items()}
    engine.destroy()
    return Held(parts | {"gradients": max(gradients)}, everything[-1], tensors)


def states_of(engine: Any, state: EngineState) -> dict[str, Memory]:
    """Everything but gradients."""
    module, optimizer = trained_module(engine), engine.optimizer
    parameters = list(module.parameters())
    adam = optimizer.optimizer.state
    return {
        "parameters": memory_of([*parameters, *(getattr(parameter, "ds_tensor", None) for parameter in parameters)]),
        "masters": memory_of(adam),
        "moments": memory_of(tensors_in([dict(moments) for moments in adam.values()])),
        "ema": memory_of(state._ema.values()),
        "buffers": memory_of(module.buffers()),
        "staging": memory_of(tensors_in([getattr(optimizer, name, None) for name in STAGING])),
    }


class Case:
    """A layout of the tiny model, planned and alive."""

    def __init__(
        self,
        rank_group: Any,
        layout: Layout,
        persistence: int = 0,
        ema: bool = False,
        look_at_everything: bool = False,
    ) -> None:
        self.layout = replace(layout, micro_batch=BATCH // layout.dp // layout.accumulation, ema=ema)
        self.persistence = persistence
        train = {"precision": layout.precision, "micro_batch_size": self.layout.micro_batch}
        self.config = tiny_config(ema_decay=0.9 if ema else None, **train)
        self.config = replace(self.config, parallel=ParallelConfig(tp=layout.tp, pp=layout.pp))
        ds = ds_config(layout.zero)
        zero = ds["zero_optimization"]
        zero |= {"reduce_bucket_size": BUCKET}
        if layout.zero == 3:
            zero["stage3_param_persistence_threshold"] = persistence
        if layout.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        if layout.offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
        group = rank_group(layout.world, f"tp{layout.tp}pp{layout.pp}")
        self.held: list[Held] = group.run(held_by_a_rank, self.config, ds, look_at_everything)
        self.plan = dry_run(self.config.model, self.layout)

    def planned(self, rank: int) -> dict[str, int]:
        """The bytes of a rank by the planner."""
        kind, data_rank = self.plan.kind(rank), self.layout.topology(rank).data_rank
        state = state_bytes(kind.shard, kind.sharding, self.layout, data_rank, self.persistence)
        return {name: value for name, value in vars(state).items() if name != "on_host"}

    def expect_state(self) -> None:
        """The planner's bytes are those found, part by part, on every rank."""
        for rank, held in enumerate(self.held):
            assert held.parts == self.planned(rank), f"rank {rank}"


def name_of(layout: Layout) -> str:
    """Of a test case."""
    return f"tp{layout.tp} x pp{layout.pp} x dp{layout.dp}, ZeRO-{layout.zero}"


LAYOUTS = [
    pytest.param(zero, dp, precision, id=f"ZeRO-{zero} x{dp}, {precision}")
    for zero in (1, 2, 3)
    for dp in (1, 2, 4)
    for precision in ("fp32", "bf16")
]


@pytest.mark.parametrize(("zero", "dp", "precision"), LAYOUTS)
def test_state_of_data_parallel_ranks(rank_group, zero, dp, precision):
    Case(rank_group, Layout(tp=1, pp=1, dp=dp, zero=zero, precision=precision)).expect_state()


KINDS = [
    pytest.param(1, "fp32", id="ZeRO-1, fp32"),
    pytest.param(1, "bf16", id="ZeRO-1, bf16"),
    pytest.param(2, "fp32", id="ZeRO-2, fp32", marks=pytest.mark.full),
    pytest.param(2, "bf16", id="ZeRO-2, bf16"),
    pytest.param(3, "fp32", id="ZeRO-3, fp32", marks=pytest.mark.full),
    pytest.param(3, "bf16", id="ZeRO-3, bf16"),
]


@pytest.mark.parametrize(("zero", "precision"), KINDS)
def test_state_with_accumulation(rank_group, zero, precision):
    Case(rank_group, Layout(tp=1, pp=1, dp=2, zero=zero, precision=precision, accumulation=2)).expect_state()


@pytest.mark.parametrize(("zero", "precision"), KINDS)
def test_state_of_tensor_parallel_ranks(rank_group, zero, precision):
    Case(rank_group, Layout(tp=2, pp=1, dp=2, zero=zero, precision=precision)).expect_state()


@pytest.mark.parametrize("layout", [Layout(1, 2, 2, 1), Layout(2, 2, 1, 1)], ids=name_of)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_of_pipeline_stages(rank_group, layout, precision):
    Case(rank_group, replace(layout, precision=precision, accumulation=4)).expect_state()


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_state_of_zero_3_with_small_parameters_kept_whole(rank_group, dp):
    Case(rank_group, Layout(tp=1, pp=1, dp=dp, zero=3), persistence=100).expect_state()


def test_state_with_a_moving_average(rank_group):
    Case(rank_group, Layout(tp=1, pp=1, dp=4, zero=2), ema=True).expect_state()


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.full), 2])
@pytest.mark.parametrize(("zero", "precision"), KINDS)
def test_state_with_an_offloaded_optimizer(rank_group, zero, precision, accumulation):
    layout = Layout(tp=1, pp=1, dp=2, zero=zero, precision=precision, accumulation=accumulation, offload_optimizer=True)
    Case(rank_group, layout).expect_state()


def test_state_with_offloaded_parameters(rank_group):
    Case(rank_group, Layout(tp=1, pp=1, dp=2, zero=3, offload_optimizer=True, offload_parameters=True)).expect_state()


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_an_engine_holds_nothing_else_but_its_buckets(rank_group, zero):
    case = Case(rank_group, Layout(tp=1, pp=1, dp=2, zero=zero), look_at_everything=True)
    for rank, held in enumerate(case.held):
        state = sum(case.planned(rank).values()) - STEP_COUNTS
        bucket = FP32 * BUCKET if zero == 3 else 0  # kept from step to step
        assert held.everything == state + bucket, f"rank {rank}"


@pytest.mark.parametrize(
    "layout",
    [*(Layout(1, 1, 4, zero) for zero in (1, 2, 3)), Layout(2, 1, 2, 1), Layout(2, 1, 2, 3), Layout(2, 2, 1, 1)],
    ids=name_of,
)
def test_ranks_write_the_planned_fragments(rank_group, layout):
    case = Case(rank_group, replace(layout, accumulation=2), ema=True)
    for rank, held in enumerate(case.held):
        assert held.fragments == case.plan.fragments(rank), f"rank {rank}"
        assert case.plan.file_bytes()[rank] == FP32 * sum(count for _, count in held.fragments.values())
