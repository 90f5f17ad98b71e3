from dataclasses import replace

import pytest

from megarq.planning.communication import (
    Links,
    gradient_bytes,
    parameter_bytes,
    pipeline_bytes,
    tensor_traffic,
)
from megarq.planning.flops import layer_flops
from megarq.planning.layout import Layout

LAYOUT = Layout(1, 1, 4, 1, accumulation=3)
"""Over four ranks each sends three quarters of what is gathered."""


def test_zero_1_reduces_once_in_fp32() -> None:
    assert gradient_bytes(LAYOUT, 100) == 2 * 400 * 3 / 4


def test_zero_2_reduces_every_micro_batch() -> None:
    assert gradient_bytes(replace(LAYOUT, zero=2), 100) == 3 * gradient_bytes(LAYOUT, 100)


def test_zero_3_scatters_what_it_reduces() -> None:
    assert gradient_bytes(replace(LAYOUT, zero=3), 100) == 3 * 400 * 3 / 4


@pytest.mark.parametrize("zero", [1, 2])
def test_updated_parameters_are_gathered_once_in_their_precision(zero) -> None:
    assert parameter_bytes(replace(LAYOUT, zero=zero), 100, 60) == 200 * 3 / 4


def test_zero_3_gathers_parameters_for_both_passes() -> None:
    assert parameter_bytes(replace(LAYOUT, zero=3), 100, 60) == 3 * 2 * 200 * 3 / 4


def test_recomputation_gathers_blocks_once_more() -> None:
    layout = replace(LAYOUT, zero=3)
    more = parameter_bytes(replace(layout, activation_checkpointing=True), 100, 60) - parameter_bytes(layout, 100, 60)
    assert more == 3 * 120 * 3 / 4


def test_one_data_parallel_rank_sends_nothing() -> None:
    layout = replace(LAYOUT, dp=1)
    assert gradient_bytes(layout, 100) == parameter_bytes(layout, 100, 60) == 0


def test_one_tensor_rank_sends_nothing(run_config) -> None:
    traffic = tensor_traffic(run_config, LAYOUT, list(layer_flops(run_config.model)))
    assert traffic.exposed == traffic.hidden == 0


def test_a_block_has_two_all_reduces_forward_and_two_backward(run_config) -> None:
    traffic = tensor_traffic(run_config, replace(LAYOUT, tp=2, micro_batch=3), ["body.1"])
    all_reduce = 3 * 24 * 128 * 2  # tokens x width x bf16, twice a half of it
    assert traffic.exposed == traffic.hidden == 2 * all_reduce


def test_a_middle_stage_sends_states_on_and_gradients_back(run_config) -> None:
    layout = replace(LAYOUT, pp=3, micro_batch=3)
    states = 3 * 24 * 128 * 2
    assert pipeline_bytes(run_config, layout, ["body.1"]) == 2 * states
    assert pipeline_bytes(run_config, layout, ["body_input", "body.0"]) == states


def test_a_ring_inside_a_node_has_its_links() -> None:
    links = Links(inside=100, between=10, gpus_per_node=8)
    assert links.data(Layout(2, 2, 4, 1)) == 100
    assert links.pipeline(Layout(2, 2, 2, 1)) == 100


def test_a_ring_between_nodes_has_the_network_of_its_members_in_a_node() -> None:
    links = Links(inside=100, between=10, gpus_per_node=8)
    assert [links.data(Layout(tp, 1, 16 // tp, 1)) for tp in (1, 2, 8)] == [80, 40, 10]
    assert links.pipeline(Layout(8, 2, 1, 1)) == 10
