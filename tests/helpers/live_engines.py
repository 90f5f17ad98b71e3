"""Engines around the tiny RQ-Transformer without a run around them, for looking at what DeepSpeed holds and sends."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from tiny_runs import CPU, global_batch, tiny_rqvae

from megarq.config.deepspeed import batch_sizes
from megarq.config.run import RQTransformerRunConfig
from megarq.engine.build import build_engine
from megarq.engine.start import resolve_and_place
from megarq.engine.transformer_run import build_transformer
from megarq.parallel.topology import ProcessGroups, Topology
from megarq.planning.flops import layer_flops
from megarq.transformer.parameters import decayed


def live_engine(
    config: RQTransformerRunConfig, ds: dict[str, Any], tp: int = 1, device: torch.device = CPU
) -> tuple[Any, ProcessGroups, dict[str, Any]]:
    """An engine on the ranks of the default group, its process groups and DeepSpeed's complete configuration."""
    config = replace(config, parallel=replace(config.parallel, tp=tp))
    resolved, topology = resolve_and_place(config, ds, dist.get_world_size(), dist.get_rank())
    groups = ProcessGroups.build(topology)
    model = build_transformer(config, resolved, groups, device, layer_flops(config.model), tiny_rqvae())
    return build_engine(model, config.train, resolved, groups, decayed, device), groups, resolved


def train(
    engine: Any, config: RQTransformerRunConfig, topology: Topology, batches: Sequence[int]
) -> list[tuple[float, float]]:
    """(loss of this rank's last micro-batch, gradient norm) of updates on numbered batches."""
    micro, accumulation = batch_sizes(config.train, topology.dp)
    seen = []
    for number in batches:
        batch = global_batch(config, number)
        engine.train()
        for index in range(accumulation):
            first = (topology.data_rank * accumulation + index) * micro
            codes = batch.codes[first : first + micro].to(engine.device)
            cond = batch.cond[first : first + micro].to(engine.device)
            image, caption = engine(codes, cond, codes)
            loss = image.mean() if caption is None else image.mean() + caption.mean()
            engine.backward(loss)
            engine.step()
        seen.append((loss.item(), float(engine.get_global_grad_norm())))
    return seen
