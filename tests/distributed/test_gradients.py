"""In bf16 runs gradients are reduced and accumulated in fp32, under every configuration that is shipped.

What is sent is seen at DeepSpeed's communication backend. That no rounding happens before, between and after is seen
in Adam's first moment: it is the mean of the micro-batches' bf16 gradients, summed in fp32, to 1e-5; summed in bf16 it
would be off by 2e-3.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tiny_runs import BATCH, engine_run, global_batch, tiny_config, tiny_model, tiny_rqvae
from torch import Tensor

from megarq.checkpoint.run_folder import checkpoint_at
from megarq.config.deepspeed import read_ds_config
from megarq.config.names import CONFIGS
from megarq.config.run import ParallelConfig, RQTransformerRunConfig
from megarq.engine.build import import_deepspeed

MICRO, STEPS = 2, 1
NAMES = ["zero1", "zero2", "zero3", "zero3-offload", "pipeline"]
CPU = {"device": "cpu"}
OTHERS = {
    "ZeRO-1, optimizer offloaded": {"zero_optimization": {"stage": 1, "offload_optimizer": CPU}},
    "ZeRO-2, optimizer offloaded": {"zero_optimization": {"stage": 2, "offload_optimizer": CPU}},
    "ZeRO-3, nothing persistent": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
}


def config_of() -> RQTransformerRunConfig:
    return tiny_config("none", precision="bf16", micro_batch_size=MICRO, steps=STEPS, clip=0.0)


def ds_of(name: str) -> dict[str, Any]:
    return OTHERS[name] if name in OTHERS else read_ds_config(CONFIGS / "deepspeed" / f"{name}.json")


@contextmanager
def reductions() -> Iterator[set[str]]:
    """Types of all tensors of more than a few numbers that DeepSpeed reduces while the body runs."""
    from deepspeed.comm.comm import cdb

    seen: set[str] = set()
    names = [name for name in dir(cdb) if "reduce" in name and callable(getattr(cdb, name))]

    def watched(call: Any) -> Any:
        def look(*args: Any, **options: Any) -> Any:
            given = [*args, *options.values()]
            tensors = [value for value in given if isinstance(value, Tensor)]
            tensors += [value for part in given if isinstance(part, list) for value in part]
            seen.update(str(tensor.dtype) for tensor in tensors if tensor.numel() > 8)
            return call(*args, **options)

        return look

    with patch.multiple(cdb, **{name: watched(getattr(cdb, name)) for name in names}):
        yield seen


def started(rank_group: Any, name: str) -> tuple[Any, ParallelConfig]:
    """Two data-parallel ranks of each stage, and the layout of a configuration."""
    parallel = ParallelConfig(pp=2 if name == "pipeline" else 1)
    return rank_group(2 * parallel.pp, f"pp{parallel.pp}"), parallel


def reduced_types(run: Path, ds: dict[str, Any], parallel: ParallelConfig) -> set[str]:
    """Types of what is reduced in one update of two micro-batches."""
    import_deepspeed(torch.device("cpu")).init_distributed(dist_init_required=False)  # or there is nothing to watch
    with reductions() as seen:
        engine_run(run, config_of(), ds, parallel)
    return seen


def summed_gradients(dtype: torch.dtype) -> dict[str, Tensor]:
    """Mean of the bf16 gradients of all micro-batches of the first update, summed in `dtype`."""
    config = config_of()
    model = tiny_model(config, tiny_rqvae()).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    sums = {name: torch.zeros_like(p, dtype=dtype) for name, p in model.named_parameters()}
    batch = global_batch(config, 0)
    for codes, cond in zip(batch.codes.split(MICRO), batch.cond.split(MICRO), strict=True):
        model.zero_grad()
        model(codes, cond, codes)[0].mean().backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad.to(dtype) * (MICRO / BATCH)
    return {name: value.float() for name, value in sums.items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of b, of all tensors together."""
    squares = [((a[name] - b[name]).square().sum(), b[name].square().sum()) for name in b]
    return float((sum(x for x, _ in squares) / sum(y for _, y in squares)) ** 0.5)


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_reductions_are_in_fp32(rank_group, run, name):
    group, parallel = started(rank_group, name)
    assert group.run(reduced_types, run, ds_of(name), parallel) == [{"torch.float32"}] * group.size


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_micro_batches_are_summed_in_fp32(rank_group, run, name):
    config, (group, parallel) = config_of(), started(rank_group, name)
    group.run(engine_run, run, config, ds_of(name), parallel)
    expected = rank_group(1, "plain").run(summed_gradients, torch.float32)[0]
    checkpoint = checkpoint_at(run)
    ours = {name: checkpoint.tensor(name, "exp_avg") / (1 - config.train.betas[0]) for name in expected}
    assert distance(ours, expected) < 1e-5


def test_a_sum_in_bf16_would_be_seen(rank_group):
    low, high = (rank_group(1, "plain").run(summed_gradients, dtype)[0] for dtype in (torch.bfloat16, torch.float32))
    assert distance(low, high) > 1e-3
