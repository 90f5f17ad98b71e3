"""Losses, gradient norms and weights of every ZeRO configuration are those of plain torch in one process."""

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Metrics, ds_config, engine_run, largest_deviation, metrics_of, plain_run, tiny_config

from megarq.checkpoint.run_folder import checkpoint_at
from megarq.config.deepspeed import read_ds_config
from megarq.config.names import CONFIGS
from megarq.config.run import ParallelConfig, RQTransformerRunConfig

FP32, BF16 = 1e-5, 1e-2
STAGES = [1, 2, 3]
CASES: dict[str, dict[str, Any]] = {
    "captions": {},
    "captions, accumulation": {"micro_batch_size": 2},
    "captions, soft targets, accumulation": {"soft": True, "micro_batch_size": 2},
    "classes": {"condition": "class"},
    "classes, soft targets": {"condition": "class", "soft": True},
    "unconditional, activation checkpointing": {"condition": "none", "activation_checkpointing": True},
    "captions, no clipping": {"clip": 0.0},
}


def expect_equal(run: Path, config: RQTransformerRunConfig, expected: Metrics, tolerance: float) -> None:
    names = [name for name in ("loss", "image_loss", "caption_loss", "grad_norm", "lr") if name in expected[0]]
    deviation = largest_deviation(metrics_of(run), expected, tuple(names))
    print(f"largest deviation {deviation:.1e}")
    assert deviation < tolerance


@pytest.fixture(scope="module")
def plain(rank_group):
    """`plain(config)`: the reference, computed on a rank of its own, so that this process stays free of threads."""
    return lambda config: rank_group(1, "plain").run(plain_run, config)[0]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_fp32_equals_plain_torch(rank_group, plain, run, name, stage):
    config = tiny_config(**CASES[name])
    rank_group(2).run(engine_run, run, config, ds_config(stage))
    metrics, weights, _ = plain(config)
    expect_equal(run, config, metrics, FP32)
    checkpoint = checkpoint_at(run)
    for name, value in weights.items():
        ours = checkpoint.tensor(name)
        if name.endswith("qkv.bias"):  # attention ignores a bias of the keys: Adam makes steps of its rounding errors
            ours, value = ours[[0, 2]], value[[0, 2]]
        assert (ours - value).norm() < 1e-3 * value.norm(), name


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_stays_near_fp32(rank_group, plain, run, stage):
    rank_group(2).run(engine_run, run, tiny_config(precision="bf16", micro_batch_size=2), ds_config(stage))
    metrics, *_ = plain(tiny_config())
    deviation = largest_deviation(metrics_of(run), metrics, ("loss",))
    print(f"largest deviation {deviation:.1e}")
    assert deviation < BF16


def test_clipping_bites_in_these_runs(plain):
    metrics, *_ = plain(tiny_config())
    assert all(line["grad_norm"] > 0.5 for line in metrics)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3-offload", "pipeline"])
def test_shipped_configurations_equal_plain_torch(rank_group, plain, run, name):
    config, parallel = tiny_config(steps=3), ParallelConfig(pp=2 if name == "pipeline" else 1)
    ds = read_ds_config(CONFIGS / "deepspeed" / f"{name}.json")
    rank_group(2, f"pp{parallel.pp}").run(engine_run, run, config, ds, parallel)
    metrics, *_ = plain(config)
    expect_equal(run, config, metrics, FP32)
