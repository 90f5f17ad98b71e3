"""Pipeline parallelism: stages of the layer list under DeepSpeed's PipelineModule.

Worked example: imagenet-1.4b (42 + 6 blocks) over pp=4. The FLOPs of the 51 layers are cut into four contiguous parts
whose largest is smallest, each rank builds its part as one `Stage`, and DeepSpeed sees a list of four layers, of which
it is given one to each rank. Between stages travel the tuples that `transformer.stages` describes: hidden states with
gradients, codes as integers without.
"""

import contextlib
import io
from collections.abc import Mapping
from typing import Any

from torch import nn

from megarq.config.models import RQTransformerConfig
from megarq.parallel.balance import balanced_parts
from megarq.parallel.topology import ProcessGroups, Topology
from megarq.transformer.stages import Stage, layer_list


def build_stage(
    config: RQTransformerConfig,
    groups: ProcessGroups,
    layer_flops: Mapping[str, int],
    shared_codebook: bool,
    recompute: bool,
) -> Stage:
    """This rank's stage, its weights uninitialised; `layer_flops` balances the stages."""
    layers = layer_list(config, groups.tensor, shared_codebook)
    assert [layer.name for layer in layers] == list(layer_flops)
    part = balanced_parts(list(layer_flops.values()), groups.topology.pp)[groups.topology.pipeline_rank]
    return Stage(config, [layers[index] for index in part], groups.tensor, recompute)


def pipeline_module(stage: nn.Module, topology: Topology) -> Any:
    """DeepSpeed's PipelineModule of one layer for each stage, this rank's being `stage`."""
    from deepspeed.runtime.pipe.module import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    grid = PipeModelDataParallelTopology(num_pp=topology.pp, num_mp=topology.tp, num_dp=topology.dp)
    layers = [stage if index == topology.pipeline_rank else _elsewhere for index in range(topology.pp)]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints settings of its own that are not used here
        return PipelineModule(layers, topology=grid, partition_method="uniform")


def trained_module(engine: Any) -> nn.Module:
    """What the engine was built around: a whole model, or this rank's stage."""
    module: nn.Module = getattr(engine.module, "forward_funcs", [engine.module])[0]
    return module


def _elsewhere(state: Any) -> Any:
    raise AssertionError("this stage runs on another rank")


def describe_pipeline(layer_flops: Mapping[str, int], pp: int, micro_batches: int) -> str:
    """Layers of each stage, its share of the FLOPs, and the share of a step that stages wait for each other."""
    weights = list(layer_flops.values())
    parts = balanced_parts(weights, pp)
    shares = [sum(weights[index] for index in part) / sum(weights) for part in parts]
    stages = ", ".join(f"{len(part)} layers {share:.1%}" for part, share in zip(parts, shares, strict=True))
    bubble = (pp - 1) / (micro_batches + pp - 1)
    return (
        f"pipeline: {stages} of the FLOPs, largest {max(shares) * pp:.2f} x the mean | "
        f"expected bubble {bubble:.1%} ({pp - 1} of {micro_batches + pp - 1} slots)"
    )
