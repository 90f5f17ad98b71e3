"""Tensor parallelism with ZeRO: losses and gradient norms are those of plain torch in one process."""

import pytest
from tiny_runs import ds_config, engine_run, largest_deviation, metrics_of, plain_run, tiny_config

FP32 = 1e-5
LAYOUTS = {f"tp2 x dp{dp}, ZeRO-{stage}": (2 * dp, 2, stage) for dp in (1, 2) for stage in (1, 2, 3)}
CASES = [
    pytest.param({"micro_batch_size": 2}, id="captions, accumulation"),
    pytest.param({"condition": "class", "soft": True}, id="classes, soft targets", marks=pytest.mark.full),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32_equals_plain_torch(rank_group, run, layout, case):
    ranks, tp, stage = LAYOUTS[layout]
    config = tiny_config(**case)
    rank_group(ranks, f"tp{tp}").run(engine_run, run, config, ds_config(stage), tp)
    metrics, *_ = rank_group(1, "plain").run(plain_run, config)[0]
    deviation = largest_deviation(metrics_of(run), metrics)
    print(f"largest deviation {deviation:.1e}")
    assert deviation < FP32
