"""A run that is killed and started again, in the same or another layout, is the run that was never interrupted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import LAYOUTS
from tiny_runs import engine_run, largest_deviation, metrics_of, plain_run, tiny_config

from megarq.checkpoint.format import Checkpoint
from megarq.checkpoint.run_folder import checkpoint_at
from megarq.config.run import CheckpointConfig, RQTransformerRunConfig

KINDS = ["param", "exp_avg", "exp_avg_sq", "ema"]
SAVED_AT, KILLED_AT = 3, 5
SAVED_ON = [
    "dp2 ZeRO-1",
    "dp2 ZeRO-3",
    "tp2 ZeRO-1",
    "tp2 ZeRO-3",
    "pp2 ZeRO-1",
    "tp2 pp2 ZeRO-1",
]
SINGLE = "dp1 ZeRO-1"
CHOSEN = {
    ("dp2 ZeRO-1", "tp2 pp2 ZeRO-1"),
    ("dp2 ZeRO-3", SINGLE),
    ("tp2 ZeRO-1", "dp2 ZeRO-3"),
    ("tp2 ZeRO-3", "pp2 ZeRO-1"),
    ("pp2 ZeRO-1", "tp2 ZeRO-3"),
    ("pp2 ZeRO-1", SINGLE),
    ("tp2 pp2 ZeRO-1", "dp2 ZeRO-3"),
    ("tp2 pp2 ZeRO-1", "tp2 ZeRO-1"),
}
MOVES = [
    pytest.param(first, second, marks=() if (first, second) in CHOSEN else pytest.mark.full)
    for first in SAVED_ON
    for second in (*SAVED_ON, SINGLE)
    if first != second
]


def config_of(**train: Any) -> RQTransformerRunConfig:
    """A run with a moving average of the weights, saved every three steps."""
    return replace(tiny_config(ema_decay=0.8, **train), checkpoint=CheckpointConfig(every=SAVED_AT, keep=0))


@pytest.fixture
def train(rank_group):
    """`train(layout, run, config, kill_at=None)`: run the engine in a layout; returns rank 0's last weights."""

    def start(layout: str, run: Path, config: RQTransformerRunConfig, kill_at: int | None = None) -> dict:
        chosen = LAYOUTS[layout]
        return chosen.on(rank_group).run(engine_run, run, config, chosen.ds, chosen.parallel, kill_at)[0]

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
@pytest.mark.parametrize("layout", ["dp2 ZeRO-1", "dp2 ZeRO-2", "dp2 ZeRO-3", "tp2 pp2 ZeRO-1"])
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
def test_another_layout(rank_group, train, record, tmp_path, first, second):
    config = config_of()
    train("dp2 ZeRO-1", tmp_path / "whole", config)
    train(first, tmp_path / "moved", config, KILLED_AT)
    train(second, tmp_path / "moved", config)
    metrics, *_ = rank_group(1, "plain").run(plain_run, config)[0]
    deviation = largest_deviation(metrics_of(tmp_path / "moved"), metrics)
    record("resumes", {"saved_on": first, "resumed_on": second, "largest_relative_deviation": deviation})
    assert deviation < 1e-5
    expect_same_tensors(checkpoint_at(tmp_path / "moved"), checkpoint_at(tmp_path / "whole"), 1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["dp1 ZeRO-1", "dp2 ZeRO-2", "dp2 ZeRO-3"])
def test_saved_parameters_are_the_models(train, run, layout, precision):
    weights = train(layout, run, config_of(precision=precision))
    checkpoint = checkpoint_at(run)
    assert checkpoint.names("param") == sorted(weights)
    for name, value in weights.items():
        assert torch.equal(checkpoint.tensor(name).to(value.dtype), value), name


@pytest.mark.parametrize("layout", ["dp2 ZeRO-2", "dp2 ZeRO-3", "tp2 ZeRO-1"])
def test_moving_average_equals_plain_torchs(rank_group, train, run, layout):
    config = config_of()
    train(layout, run, config)
    _, _, average = rank_group(1, "plain").run(plain_run, config)[0]
    checkpoint = checkpoint_at(run)
    for name, expected in average.items():
        ours = checkpoint.tensor(name, "ema")
        if name.endswith("qkv.bias"):
            ours, expected = ours[[0, 2]], expected[[0, 2]]
        assert (ours - expected).norm() <= 1e-3 * expected.norm(), name


def test_moving_average_starts_from_the_weights_of_a_run_without_one(train, run):
    config = config_of()
    train("dp2 ZeRO-2", run, replace(config, train=replace(config.train, ema_decay=None)), KILLED_AT)
    start = {name: checkpoint_at(run).tensor(name) for name in checkpoint_at(run).names()}
    config.train.lr = 1e-12
    train("dp2 ZeRO-2", run, config)
    for name, value in start.items():
        torch.testing.assert_close(checkpoint_at(run).tensor(name, "ema"), value, rtol=1e-6, atol=1e-7, msg=name)


def test_optimiser_steps_are_counted_across_a_resume(train, run):
    train("dp2 ZeRO-3", run, config_of(), KILLED_AT)
    train("dp2 ZeRO-3", run, config_of())
    assert checkpoint_at(run).metadata["optimizer_step"] == 6
