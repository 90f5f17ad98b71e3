"""The planner's activations and tensor-parallel traffic are those of real models, counted while they run.

Saved bytes are counted by torch's hooks on what autograd saves, each storage once, parameters and buffers left out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarq.config.models import RQTransformerConfig, StackConfig
from megarq.config.run import RQTransformerRunConfig
from megarq.parallel.topology import ProcessGroups, TensorGroup, Topology
from megarq.planning.activations import activation_bytes
from megarq.planning.communication import tensor_traffic
from megarq.planning.layout import Layout
from megarq.transformer.rq_transformer import RQTransformer

TEXT = RQTransformerConfig(
    code_shape=[4, 4, 4],
    codebook_size=64,
    codebook_dim=16,
    embed_dim=128,
    body=StackConfig(layers=3, heads=4),
    head=StackConfig(layers=2, heads=4),
    cond_length=9,
    cond_vocab_size=32,
)
CONDITIONS = {"captions": TEXT, "classes": replace(TEXT, cond_length=1, cond_vocab_size=7)}
BATCH = 3


@cache
def tensor_ranks() -> TensorGroup:
    """All ranks as one tensor group."""
    size = dist.get_world_size()
    return ProcessGroups.build(Topology(size, dist.get_rank(), tp=size)).tensor


def prepared(config: RQTransformerConfig, layout: Layout) -> Callable[[], Tensor]:
    """A forward pass of one micro-batch of a model in training, to its summed losses."""
    tp = replace(tensor_ranks(), sequence=layout.sequence) if layout.tp > 1 else TensorGroup()
    model = RQTransformer(config, tp, activation_checkpointing=layout.activation_checkpointing)
    model.initialize(0)
    model.to(torch.bfloat16 if layout.precision == "bf16" else torch.float32).train()
    codes = torch.zeros(layout.micro_batch, *config.code_shape, dtype=torch.int64)
    cond = torch.zeros(layout.micro_batch, config.cond_length, dtype=torch.int64)
    parts = [*model.parameters(), *model.buffers()]

    def forward() -> Tensor:
        return sum(losses.sum() for losses in model(codes, cond, codes) if losses is not None)

    forward.own = {part.untyped_storage().data_ptr() for part in parts}
    return forward


def planned_over_saved(config: RQTransformerConfig, layout: Layout) -> float:
    """The planner's bytes over those that autograd saves."""
    forward = prepared(config, layout)
    saved: dict[int, Any] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in forward.own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        forward()
    planned = activation_bytes(run_of(config), layout, whole_model(config), mask=layout.bytes_each)
    return planned / sum(storage.nbytes() for storage in saved.values())


def run_of(config: RQTransformerConfig) -> RQTransformerRunConfig:
    return RQTransformerRunConfig(model=config)


def whole_model(config: RQTransformerConfig) -> list[str]:
    blocks = [f"{stack}.{index}" for stack in ("body", "head") for index in range(getattr(config, stack).layers)]
    return ["body_input", *blocks[: config.body.layers], "head_input", *blocks[config.body.layers :], "outputs"]


def planned_over_sent(config: RQTransformerConfig, layout: Layout) -> float:
    """The planner's traffic of a forward and a backward pass over what the ranks of this group send in rings."""
    forward = prepared(config, layout)
    with counted_collectives() as sent:
        forward().backward()
    planned = tensor_traffic(run_of(config), layout, whole_model(config))
    return (planned.exposed + planned.hidden) / (sum(sent) * (layout.tp - 1) / layout.tp)


@contextmanager
def counted_collectives() -> Iterator[list[int]]:
    """Bytes of the whole tensor of each all-gather and reduce-scatter; an all-reduce is one of each."""
    sent: list[int] = []
    whole = {"all_reduce": lambda x: 2 * x.nbytes, "all_gather_into_tensor": lambda rows, x: rows.nbytes}
    whole["reduce_scatter_tensor"] = lambda own, rows: rows.nbytes
    real = {name: getattr(dist, name) for name in whole}

    def counting(name: str) -> Callable[..., Any]:
        def call(*tensors: Tensor, **options: Any) -> Any:
            sent.append(whole[name](*tensors))
            return real[name](*tensors, **options)

        return call

    for name in real:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(("tp", "sequence"), [(1, False), (2, False), (2, True)])
def test_planned_activations_are_what_autograd_saves(rank_group, tp, sequence, condition, dropout, precision) -> None:
    config = replace(CONDITIONS[condition], dropout=dropout)
    layout = Layout(tp, 1, 1, 1, sequence=sequence, micro_batch=BATCH, precision=precision)
    ratios = rank_group(tp, f"tp{tp}").run(planned_over_saved, config, layout)
    assert ratios == pytest.approx([1.0] * tp, abs=0.1)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sequence", [False, True])
def test_planned_tensor_traffic_is_what_ranks_send(rank_group, sequence, recompute, dropout) -> None:
    layout = Layout(2, 1, 1, 1, sequence=sequence, micro_batch=BATCH, activation_checkpointing=recompute)
    ratios = rank_group(2, "tp2").run(planned_over_sent, replace(TEXT, dropout=dropout), layout)
    assert ratios == pytest.approx([1.0] * 2, abs=0.03)
