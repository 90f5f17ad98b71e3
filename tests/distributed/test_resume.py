"""A run that is killed and started again, in the same or another layout, is the run that was never interrupted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import ds_config, engine_run, largest_deviation, metrics_of, plain_run, tiny_config

from megarq.checkpoint.format import Checkpoint
from megarq.checkpoint.run_folder import checkpoint_at
from megarq.config.run import CheckpointConfig, RQTransformerRunConfig

KINDS = ["param", "exp_avg", "exp_avg_sq", "ema"]
SAVED_AT, KILLED_AT = 3, 5
LAYOUTS = {
    "ZeRO-1 x1": (1, 1, 1),
    "ZeRO-1 x2": (2, 1, 1),
    "ZeRO-2 x2": (2, 1, 2),
    "ZeRO-3 x2": (2, 1, 3),
    "tp2, ZeRO-1": (2, 2, 1),
    "tp2 x dp2, ZeRO-3": (4, 2, 3),
}
MOVES = [
    ("ZeRO-3 x2", "ZeRO-1 x1"),
    ("ZeRO-1 x1", "ZeRO-3 x2"),
    ("tp2, ZeRO-1", "ZeRO-2 x2"),
    ("ZeRO-3 x2", "tp2, ZeRO-1"),
    pytest.param("ZeRO-1 x2", "tp2 x dp2, ZeRO-3", marks=pytest.mark.full),
    pytest.param("tp2 x dp2, ZeRO-3", "ZeRO-2 x2", marks=pytest.mark.full),
]


def config_of(**train: Any) -> RQTransformerRunConfig:
    """A run with a moving average of the weights, saved every three steps."""
    return replace(tiny_config(ema_decay=0.8, **train), checkpoint=CheckpointConfig(every=SAVED_AT, keep=0))


@pytest.fixture
def train(rank_group):
    """`train(layout, run, config, kill_at=None)`: run the engine in a layout; returns rank 0's last weights."""

    def start(layout: str, run: Path, config: RQTransformerRunConfig, kill_at: int | None = None) -> dict:
        ranks, tp, stage = LAYOUTS[layout]
        return rank_group(ranks, f"tp{tp}").run(engine_run, run, config, ds_config(stage), tp, kill_at)[0]

    return start


def expect_same_tensors(ours: Checkpoint, expected: Checkpoint, tolerance: float) -> None:
    """Parameters, moments and moving averages agree; but for the key biases, whose gradients are rounding errors."""
    for kind in KINDS:
        assert ours.names(kind) == expected.names(kind) != []
        for name in ours.names(kind):
            a, b = ours.tensor(name, kind), expected.tensor(name, kind)
            if name.endswith("qkv.bias"):
                a, b = a[[0, 2]], b[[0, 2]]
            assert (a - b).norm() <= tolerance * b.norm(), f"{kind} of {name}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["ZeRO-1 x2", "ZeRO-2 x2", "ZeRO-3 x2"])
def test_same_layout(train, tmp_path, layout, precision):
    config = config_of(precision=precision)
    train(layout, tmp_path / "whole", config)
    train(layout, tmp_path / "killed", config, KILLED_AT)
    assert checkpoint_at(tmp_path / "killed").metadata["step"] == SAVED_AT
    train(layout, tmp_path / "killed", config)
    whole, resumed = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "killed")
    assert [line["step"] for line in resumed] == [1, 2, 3, 4, 5, 6]
    assert largest_deviation(resumed, whole, ("loss", "image_loss", "caption_loss", "grad_norm", "lr")) < 1e-6
    expect_same_tensors(checkpoint_at(tmp_path / "killed"), checkpoint_at(tmp_path / "whole"), 1e-6)


@pytest.mark.parametrize(("first", "second"), MOVES)
def test_another_layout(rank_group, train, tmp_path, first, second):
    config = config_of()
    train("ZeRO-1 x2", tmp_path / "whole", config)
    train(first, tmp_path / "moved", config, KILLED_AT)
    train(second, tmp_path / "moved", config)
    metrics, *_ = rank_group(1, "plain").run(plain_run, config)[0]
    deviation = largest_deviation(metrics_of(tmp_path / "moved"), metrics)
    print(f"largest deviation {deviation:.1e}")
    assert deviation < 1e-5
    expect_same_tensors(checkpoint_at(tmp_path / "moved"), checkpoint_at(tmp_path / "whole"), 1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["ZeRO-1 x1", "ZeRO-2 x2", "ZeRO-3 x2"])
def test_saved_parameters_are_the_models(train, run, layout, precision):
    weights = train(layout, run, config_of(precision=precision))
    checkpoint = checkpoint_at(run)
    assert checkpoint.names("param") == sorted(weights)
    for name, value in weights.items():
        assert torch.equal(checkpoint.tensor(name).to(value.dtype), value), name


@pytest.mark.parametrize("layout", ["ZeRO-2 x2", "ZeRO-3 x2", "tp2, ZeRO-1"])
def test_moving_average_equals_plain_torchs(rank_group, train, run, layout):
    config = config_of()
    train(layout, run, config)
    _, _, average = rank_group(1, "plain").run(plain_run, config)[0]
    checkpoint = checkpoint_at(run)
    for name, expected in average.items():
        ours = checkpoint.tensor(name, "ema")
        if name.endswith("qkv.bias"):
            ours, expected = ours[[0, 2]], expected[[0, 2]]
        assert (ours - expected).norm() <= 1e-4 * expected.norm(), name


def test_moving_average_starts_from_the_weights_of_a_run_without_one(train, run):
    config = config_of()
    train("ZeRO-2 x2", run, replace(config, train=replace(config.train, ema_decay=None)), KILLED_AT)
    start = {name: checkpoint_at(run).tensor(name) for name in checkpoint_at(run).names()}
    config.train.lr = 1e-12
    train("ZeRO-2 x2", run, config)
    for name, value in start.items():
        torch.testing.assert_close(checkpoint_at(run).tensor(name, "ema"), value, rtol=1e-6, atol=1e-7, msg=name)


def test_optimiser_steps_are_counted_across_a_resume(train, run):
    train("ZeRO-3 x2", run, config_of(), KILLED_AT)
    train("ZeRO-3 x2", run, config_of())
    assert checkpoint_at(run).metadata["optimizer_step"] == 6
