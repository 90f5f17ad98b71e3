"""The formulas by hand, on a shard without padding; tests/distributed holds them against live engines."""

from dataclasses import replace

import pytest

from megarq.planning.layout import Layout
from megarq.planning.sharding import Shard, ShardParameter, optimizer_sharding
from megarq.planning.state import StateBytes, state_bytes

LARGE, SMALL = 800, 40
NUMBERS = LARGE + SMALL
SHARD = Shard(
    stage=0,
    tensor_rank=0,
    layers=("body.0",),
    parameters=(
        ShardParameter("body.0.mlp.up.weight", (LARGE,), None),
        ShardParameter("body.0.mlp.up.bias", (SMALL,), None),
    ),
    buffer_bytes=64,
)
DP = 4
PART = NUMBERS // DP
STEP_COUNTS = 2 * 4
"""Of the two flat tensors."""


def state(zero: int, persistence: int = 0, **fields: object) -> StateBytes:
    """Of the first of four data-parallel ranks."""
    layout = replace(Layout(tp=1, pp=1, dp=DP, zero=zero), **fields)
    return state_bytes(SHARD, optimizer_sharding(SHARD.parameters, layout), layout, 0, persistence)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_masters_and_moments_are_cut_at_every_stage(zero: int) -> None:
    found = state(zero)
    assert (found.masters, found.moments) == (4 * PART, 8 * PART + STEP_COUNTS)


@pytest.mark.parametrize(("precision", "each"), [("bf16", 2), ("fp32", 4)])
def test_parameters_are_whole_below_zero_3(precision: str, each: int) -> None:
    found = {zero: state(zero, precision=precision).parameters for zero in (1, 2, 3)}
    assert found == {1: each * NUMBERS, 2: each * NUMBERS, 3: each * PART}


def test_zero_3_adds_the_small_parameters_whole() -> None:
    assert state(3, persistence=SMALL).parameters == 2 * (PART + SMALL)


def test_zero_1_in_bf16_keeps_sums_of_all_gradients_beside_them() -> None:
    assert state(1).gradients == (4 + 2) * NUMBERS


@pytest.mark.parametrize("zero", [2, 3])
def test_gradients_are_cut_from_zero_2_on(zero: int) -> None:
    assert state(zero).gradients == 4 * PART


def test_gradients_of_zero_1_in_fp32_stay_whole_between_micro_batches() -> None:
    assert state(1, precision="fp32", accumulation=2).gradients == 4 * NUMBERS


def test_a_moving_average_is_of_the_numbers_owned() -> None:
    assert state(2, ema=True).ema == 4 * PART


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_nothing_is_in_the_hosts_memory_unless_offloaded(zero: int) -> None:
    found = state(zero)
    assert (found.host, found.device) == (0, found.total)


def test_offloaded_zero_3_leaves_buffers_alone_on_the_device() -> None:
    found = state(3, offload_optimizer=True, offload_parameters=True)
    assert found.device == SHARD.buffer_bytes


def test_an_offloaded_optimizer_leaves_parameters_and_gradients_on_the_device() -> None:
    found = state(2, offload_optimizer=True)
    passing = 2 * LARGE
    """The largest gradient, on its way to the host."""
    assert found.device == 2 * NUMBERS + 4 * PART + passing + SHARD.buffer_bytes
