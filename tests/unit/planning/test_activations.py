"""The formulas against what torch's allocator says, and against each other.

tests/distributed/test_planned_activations.py compares them with what autograd saves, cut over ranks too.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megarq.config.run import RQTransformerRunConfig
from megarq.planning.activations import (
    activation_bytes,
    held_micro_batches,
    loss_in_parts,
    received_bytes,
    sent_bytes,
    working_bytes,
)
from megarq.planning.flops import layer_flops
from megarq.planning.layout import Layout
from megarq.transformer.outputs import LOGITS_AT_ONCE
from megarq.transformer.rq_transformer import RQTransformer

ALONE = Layout(1, 1, 1, 1, micro_batch=4, precision="fp32")


def whole_model(config: RQTransformerRunConfig) -> list[str]:
    return list(layer_flops(config.model))


def allocated(work: Callable[[], Any]) -> tuple[int, int, Any]:
    """Bytes that are allocated after some work and were not before, the most there were in between, and the answer."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        answer = work()
    held = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return held, most, answer


def passes(config: RQTransformerRunConfig, layout: Layout) -> tuple[int, int]:
    """Bytes that a forward pass of the whole model leaves, and the most of both passes, outside its parameters."""
    model = RQTransformer(config.model, activation_checkpointing=layout.activation_checkpointing)
    model.initialize(0)
    model.to(torch.bfloat16 if layout.precision == "bf16" else torch.float32).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    codes = torch.zeros(layout.micro_batch, *config.model.code_shape, dtype=torch.int64)
    cond = torch.zeros(layout.micro_batch, config.model.cond_length, dtype=torch.int64)
    kept, _, losses = allocated(lambda: model(codes, cond, codes))
    loss = sum(terms.sum() for terms in losses if terms is not None)
    _, more, _ = allocated(loss.backward)
    return kept, kept + more


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_planned_activations_are_what_a_forward_pass_leaves_allocated(run_config, recompute, precision) -> None:
    layout = replace(ALONE, activation_checkpointing=recompute, precision=precision)
    kept, _ = passes(run_config, layout)
    assert activation_bytes(run_config, layout, whole_model(run_config)) == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("recompute", [False, True])
def test_planned_peak_is_that_of_the_backward_pass(run_config, recompute) -> None:
    layout = replace(ALONE, activation_checkpointing=recompute)
    _, most = passes(run_config, layout)
    layers = whole_model(run_config)
    planned = activation_bytes(run_config, layout, layers) + working_bytes(run_config, layout, layers)
    assert planned == pytest.approx(most, rel=0.1)


@pytest.mark.parametrize("batch", [16, 40])
def test_planned_peak_is_that_of_the_loss(run_config, batch) -> None:
    """Of 1,024 tokens, whose logits are kept, and of 2,560, whose logits are computed in parts."""
    run_config.model.codebook_size, run_config.model.embed_dim = 16384, 32
    layers, layout = whole_model(run_config), replace(ALONE, micro_batch=batch)
    kept, most = passes(run_config, layout)
    assert activation_bytes(run_config, layout, layers) == pytest.approx(kept, rel=0.01)
    assert activation_bytes(run_config, layout, layers) + working_bytes(run_config, layout, layers) == pytest.approx(
        most, rel=0.05
    )


def test_a_large_batch_keeps_no_logits(run_config) -> None:
    codes = run_config.model.positions * run_config.model.depth
    most = LOGITS_AT_ONCE // (codes * run_config.model.codebook_size)
    whole, parts = (replace(ALONE, micro_batch=size) for size in (most, most + 1))
    assert not loss_in_parts(run_config, whole) and loss_in_parts(run_config, parts)
    layers = ["outputs"]
    assert activation_bytes(run_config, parts, layers) < activation_bytes(run_config, whole, layers) / 2


def test_soft_targets_are_kept_for_the_loss(run_config) -> None:
    hard = activation_bytes(run_config, ALONE, ["outputs"])
    run_config.objective.targets = "soft"
    codes = ALONE.micro_batch * run_config.model.positions * run_config.model.depth
    more = activation_bytes(run_config, ALONE, ["outputs"]) - hard
    assert more == codes * (4 * run_config.model.codebook_size - 8)  # fp32 in place of int64


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropout_masks_are_one_byte_on_a_gpu(run_config, precision) -> None:
    layout = replace(ALONE, precision=precision)
    block = ["body.1", "outputs"]
    without = activation_bytes(run_config, layout, block)
    run_config.model.dropout = 0.1
    tokens = 4 * (9 + 16 - 1)
    assert activation_bytes(run_config, layout, block) - without == 2 * tokens * 128
    assert activation_bytes(run_config, layout, block, layout.bytes_each) > without


def test_stages_keep_what_the_model_keeps_and_what_they_send(run_config) -> None:
    layers = whole_model(run_config)
    whole = activation_bytes(run_config, ALONE, layers)
    for cut in range(1, len(layers)):
        stages = layers[:cut], layers[cut:]
        kept = sum(activation_bytes(run_config, ALONE, stage) for stage in stages)
        assert kept == whole + sent_bytes(run_config, ALONE, stages[0]), cut


def test_what_a_stage_sends_is_what_the_next_receives(run_config) -> None:
    layers = whole_model(run_config)
    for cut in range(1, len(layers)):
        assert sent_bytes(run_config, ALONE, layers[:cut]) == received_bytes(run_config, ALONE, layers[cut:]) > 0


def test_early_stages_hold_more_micro_batches() -> None:
    assert [held_micro_batches(Layout(1, 4, 1, 1, accumulation=3), stage) for stage in range(4)] == [3, 3, 2, 1]
