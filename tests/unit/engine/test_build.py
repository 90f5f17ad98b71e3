"""What a DeepSpeed engine is built from, as far as it needs no process group."""

import pytest
import torch
from torch import nn

from megarq.config.models import StackConfig
from megarq.config.run import TrainConfig
from megarq.engine.build import construction, parameter_groups, prepare
from megarq.engine.fragments import is_sharded
from megarq.engine.kernels import choose_kernels
from megarq.parallel.topology import ProcessGroups, Topology
from megarq.transformer.blocks import Block

CPU = torch.device("cpu")
ZERO1 = {"zero_optimization": {"stage": 1}}


def test_matrices_and_the_rest_decay_differently():
    groups = parameter_groups(nn.Linear(3, 2), 0.1, lambda name: name == "weight")
    assert [(group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in groups] == [
        (0.1, [(2, 3)]),
        (0.0, [(2,)]),
    ]


def test_an_empty_group_and_frozen_parameters_are_left_out():
    module = nn.Linear(3, 2).requires_grad_(False)
    module.weight.requires_grad_(True)
    (group,) = parameter_groups(module, 0.1, lambda name: True)
    assert group["params"] == [module.weight]


@pytest.mark.parametrize(("stage", "enabled"), [(1, True), (2, True), (3, False)])
def test_a_model_is_built_whole_without_zero_3_or_where_told_so(stage, enabled):
    groups = ProcessGroups.build(Topology())
    ds = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    with construction(ds, groups, CPU, enabled):
        module = nn.Sequential(nn.Linear(3, 2))
    assert not any(is_sharded(parameter) for parameter in module.parameters())
    assert all(parameter.dtype == torch.bfloat16 for parameter in module.parameters())


@pytest.mark.parametrize("wanted", [False, True])
def test_blocks_are_compiled_where_that_is_asked_for(monkeypatch, wanted):
    compiled = []
    monkeypatch.setattr(Block, "compile", lambda block, dynamic: compiled.append(block))
    module = nn.Sequential(Block(8, StackConfig(heads=2), 0.0), nn.Linear(8, 8))
    prepare(module, TrainConfig(steps=1, compile=wanted), lambda name: True, choose_kernels("auto", CPU, ZERO1))
    assert compiled == ([module[0]] if wanted else [])
