"""Other kernels, the same training: a made-up apex that keeps its state as NVIDIA's does, and compiled blocks."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import made_up_apex
import pytest
import torch
from tiny_runs import ds_config, engine_run, largest_deviation, metrics_of, plain_run, tiny_config
from torch import nn

from megarq.checkpoint.run_folder import checkpoint_at
from megarq.config.run import CheckpointConfig, ParallelConfig, RQTransformerRunConfig
from megarq.engine import build
from megarq.engine.kernels import choose_kernels
from megarq.transformer.blocks import Block

FP32 = 1e-5
SAVED_AT, KILLED_AT = 3, 5


def config_of(**train: Any) -> RQTransformerRunConfig:
    return replace(tiny_config(**train), checkpoint=CheckpointConfig(every=SAVED_AT, keep=0))


def run_with_apex(run: Path, config: RQTransformerRunConfig, ds: dict, kill_at: int | None = None) -> dict[str, int]:
    """The engine's run with apex's kernels, as on a GPU; counts of their calls."""
    made_up_apex.install()
    made_up_apex.CALLS.update(layer_norm=0, adam=0)
    with patch.object(build, "choose_kernels", lambda _, device, ds: choose_kernels("apex", torch.device("cuda"), ds)):
        engine_run(run, config, ds, None, kill_at)
    return made_up_apex.CALLS


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_a_run_with_apex_resumes_exactly(rank_group, tmp_path, stage, precision):
    config, group = config_of(precision=precision), rank_group(2, "apex")
    calls, _ = group.run(run_with_apex, tmp_path / "whole", config, ds_config(stage))
    assert calls["layer_norm"] >= 6 * 6
    assert (calls["adam"] > 0) == (stage < 3)
    group.run(run_with_apex, tmp_path / "killed", config, ds_config(stage), KILLED_AT)
    group.run(run_with_apex, tmp_path / "killed", config, ds_config(stage))
    assert checkpoint_at(tmp_path / "killed").metadata["optimizer_step"] == config.train.steps
    assert largest_deviation(metrics_of(tmp_path / "killed"), metrics_of(tmp_path / "whole")) < 1e-6
    if precision == "fp32":
        metrics, *_ = rank_group(1, "plain").run(plain_run, config)[0]
        assert largest_deviation(metrics_of(tmp_path / "whole"), metrics) < FP32


@pytest.mark.parametrize("first", ["apex", "torch"])
def test_adams_count_moves_between_apex_and_torch(rank_group, run, first):
    config, group = config_of(), rank_group(2, "apex")
    if first == "apex":
        group.run(run_with_apex, run, config, ds_config(1), KILLED_AT)
        group.run(engine_run, run, config, ds_config(1))
    else:
        group.run(engine_run, run, config, ds_config(1), None, KILLED_AT)
        group.run(run_with_apex, run, config, ds_config(1))
    assert checkpoint_at(run).metadata["optimizer_step"] == config.train.steps
    metrics, *_ = rank_group(1, "plain").run(plain_run, config)[0]
    assert largest_deviation(metrics_of(run), metrics) < FP32


def compiled_run(run: Path, config: RQTransformerRunConfig, ds: dict, parallel: ParallelConfig | None = None) -> int:
    """The engine's run with blocks compiled as far as the backward graph, without a code generator; their number."""
    compiled = []

    def compile_block(block: Block, dynamic: bool) -> None:
        assert not dynamic  # or attention, whose causality would be a symbol, would cut every graph
        compiled.append(block)
        nn.Module.compile(block, backend="aot_eager", dynamic=dynamic, fullgraph=not block.attention.qkv.tp.group)

    with patch.object(Block, "compile", compile_block):
        engine_run(run, config, ds, parallel)
    return len(compiled)


@pytest.mark.parametrize(("stage", "checkpointing"), [(1, False), (2, True)])
def test_compiled_blocks_train_alike(rank_group, run, stage, checkpointing):
    config = tiny_config(steps=3, compile=True, activation_checkpointing=checkpointing)
    assert rank_group(2).run(compiled_run, run, config, ds_config(stage)) == [5, 5]
    metrics, *_ = rank_group(1, "plain").run(plain_run, config)[0]
    assert largest_deviation(metrics_of(run), metrics) < FP32


@pytest.mark.parametrize("parallel", [ParallelConfig(tp=2), ParallelConfig(pp=2), ParallelConfig(tp=2, sequence=True)])
def test_compiled_blocks_of_a_cut_model_train_alike(rank_group, run, parallel):
    config = tiny_config(steps=3, compile=True)
    group = rank_group(2, f"tp{parallel.tp} pp{parallel.pp} {parallel.sequence}")
    assert sum(group.run(compiled_run, run, config, ds_config(1), parallel)) == 5 * parallel.tp
    metrics, *_ = rank_group(1, "plain").run(plain_run, config)[0]
    assert largest_deviation(metrics_of(run), metrics) < FP32


def test_blocks_are_left_alone_unless_asked(rank_group, run):
    assert rank_group(2).run(compiled_run, run, tiny_config(steps=1), ds_config(1)) == [0, 0]
