"""States in CPU memory (offload), second copies of parameters (hpZ): the same losses, also after a resume."""

from dataclasses import replace
from typing import Any

import pytest
from tiny_runs import ds_config, engine_run, largest_deviation, metrics_of, plain_run, tiny_config

from megarq.checkpoint.run_folder import checkpoint_at
from megarq.config.run import CheckpointConfig, RQTransformerRunConfig

FP32 = 1e-5
SAVED_AT, KILLED_AT = 3, 5
CPU = {"device": "cpu"}
OFFLOADS: dict[str, dict[str, Any]] = {
    "ZeRO-1, optimizer": {"stage": 1, "offload_optimizer": CPU},
    "ZeRO-2, optimizer": {"stage": 2, "offload_optimizer": CPU},
    "ZeRO-3, optimizer": {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_optimizer": CPU},
    "ZeRO-3, parameters": {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_param": CPU},
    "ZeRO-3, both": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": CPU,
        "offload_param": CPU,
    },
}
HPZ = {"stage": 3, "stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": 2}


def config_of(**train: Any) -> RQTransformerRunConfig:
    config = tiny_config(micro_batch_size=2, ema_decay=0.8, **train)
    return replace(config, checkpoint=CheckpointConfig(every=SAVED_AT, keep=0))


@pytest.fixture
def expect_plain(rank_group):
    """Assert that a run's losses and norms are those of plain torch."""

    def compare(run) -> None:
        metrics, *_ = rank_group(1, "plain").run(plain_run, config_of())[0]
        assert largest_deviation(metrics_of(run), metrics) < FP32

    return compare


IN_BF16 = ("ZeRO-2, optimizer", "ZeRO-3, both")
CASES = [
    *((name, "fp32") for name in OFFLOADS),
    *(pytest.param(name, "bf16", marks=[] if name in IN_BF16 else pytest.mark.full) for name in OFFLOADS),
]


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_an_offloaded_run_resumes_exactly(rank_group, expect_plain, tmp_path, name, precision):
    config, ds, group = config_of(precision=precision), {"zero_optimization": OFFLOADS[name]}, rank_group(2)
    group.run(engine_run, tmp_path / "whole", config, ds)
    group.run(engine_run, tmp_path / "killed", config, ds, None, KILLED_AT)
    assert checkpoint_at(tmp_path / "killed").metadata["step"] == SAVED_AT
    group.run(engine_run, tmp_path / "killed", config, ds)
    assert largest_deviation(metrics_of(tmp_path / "killed"), metrics_of(tmp_path / "whole")) < 1e-6
    if precision == "fp32":
        expect_plain(tmp_path / "whole")


@pytest.mark.parametrize(("first", "second"), [("ZeRO-3, both", "ZeRO-1"), ("ZeRO-1", "ZeRO-3, both")])
def test_offloaded_states_move_to_another_layout(rank_group, expect_plain, run, first, second):
    layouts = {name: {"zero_optimization": zero} for name, zero in OFFLOADS.items()} | {"ZeRO-1": ds_config(1)}
    rank_group(2).run(engine_run, run, config_of(), layouts[first], None, KILLED_AT)
    rank_group(2).run(engine_run, run, config_of(), layouts[second])
    expect_plain(run)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_with_second_copies_resumes_exactly(rank_group, expect_plain, tmp_path, precision):
    """DeepSpeed keeps the groups of hpZ for the life of a process: each engine has its own ranks."""
    config, ds, group = config_of(precision=precision), {"zero_optimization": HPZ}, rank_group(4)
    group.run(engine_run, tmp_path / "whole", config, ds)
    group.close()
    group.run(engine_run, tmp_path / "killed", config, ds, None, KILLED_AT)
    group.close()
    group.run(engine_run, tmp_path / "killed", config, ds)
    group.close()
    assert largest_deviation(metrics_of(tmp_path / "killed"), metrics_of(tmp_path / "whole")) < 1e-6
    if precision == "fp32":
        expect_plain(tmp_path / "whole")
