"""What a pipelined run does between its steps: validation, and pictures sampled from the whole model."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import LAYOUTS
from tiny_runs import BATCH, CPU, global_batch, tiny_config, tiny_rqvae
from torch import Tensor

from megarq.config.run import LogConfig, ParallelConfig, RQTransformerRunConfig
from megarq.data.loader import CodeBatch
from megarq.engine.build import build_engine
from megarq.engine.pipeline import describe_pipeline
from megarq.engine.start import resolve_and_place
from megarq.engine.transformer_run import build_transformer
from megarq.engine.transformer_task import TransformerTask
from megarq.parallel.topology import ProcessGroups
from megarq.planning.flops import layer_flops
from megarq.transformer.parameters import decayed

Seen = tuple[dict[str, float] | None, Tensor | None, float]


def train_look_train(config: RQTransformerRunConfig, ds: dict[str, Any], parallel: ParallelConfig) -> Seen:
    """A step, then validation and pictures, then another step: (validation, grid, loss of the second step)."""
    config = replace(config, parallel=parallel, log=LogConfig(sample_count=4))
    resolved, topology = resolve_and_place(config, ds, dist.get_world_size(), dist.get_rank())
    groups = ProcessGroups.build(topology, parallel.sequence)
    rqvae = tiny_rqvae()
    module = build_transformer(config, resolved, groups, CPU, layer_flops(config.model), rqvae)
    engine = build_engine(module, config.train, resolved, groups, decayed, CPU)

    def share(number: int, kept: int = BATCH) -> CodeBatch:
        batch, size = global_batch(config, number), BATCH // topology.dp
        batch.weights = (torch.arange(BATCH) < kept).float()
        part = slice(topology.data_rank * size, (topology.data_rank + 1) * size)
        return replace(batch, **{k: v[part] for k, v in vars(batch).items() if isinstance(v, Tensor)})

    task = TransformerTask(
        engine,
        module=module,
        config=config,
        rqvae=rqvae,
        tokenizer=None,
        validation=lambda: [share(20), share(21, kept=3)],
        groups=groups,
        device=CPU,
        samples_per_epoch=1000,
    )
    engine.train()
    task.passes.train(task.micro_batches(share(0), 2), [0, 1])
    with torch.no_grad():
        engine.eval()
        values, shown = task.validate(), task.pictures()
    engine.train()
    loss = task.passes.train(task.micro_batches(share(1), 2), [2, 3])["loss"].item()
    return values, None if shown is None else shown[0], loss


def config_of(body_input: str) -> RQTransformerRunConfig:
    config = tiny_config("class", soft=True, dropout=0.1, micro_batch_size=4)
    return replace(config, model=replace(config.model, body_input=body_input))


@pytest.fixture(scope="module", params=["codebook", "learned"])
def alone(rank_group, request) -> tuple[RQTransformerRunConfig, Seen]:
    layout, config = LAYOUTS["dp1 ZeRO-1"], config_of(request.param)
    return config, layout.on(rank_group).run(train_look_train, config, layout.ds, layout.parallel)[0]


@pytest.mark.parametrize("name", ["pp2 ZeRO-1", "pp4 ZeRO-1", "tp2 pp2 ZeRO-1", "tp2 sequence pp2 ZeRO-1"])
def test_validation_and_pictures_are_those_of_a_single_process(rank_group, alone, name):
    layout, (config, alone) = LAYOUTS[name], alone
    seen = layout.on(rank_group).run(train_look_train, config, layout.ds, layout.parallel)
    for values, _, loss in seen:
        assert values == pytest.approx(alone[0], rel=1e-5)
        assert loss == pytest.approx(alone[2], rel=1e-5)
    torch.testing.assert_close(seen[0][1], alone[1], rtol=1e-4, atol=1e-4)
    last_stage = seen[-layout.parallel.tp :]
    assert all(grid is None for _, grid, _ in last_stage)


def test_the_balance_and_the_bubble_are_told():
    flops = {"body_input": 1, "body.0": 40, "body.1": 40, "head_input": 1, "head.0": 38, "outputs": 40}
    assert describe_pipeline(flops, 2, 7) == (
        "pipeline: 3 layers 50.6%, 3 layers 49.4% of the FLOPs, largest 1.01 x the mean | "
        "expected bubble 12.5% (1 of 8 slots)"
    )
