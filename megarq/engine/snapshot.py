"""A module whose parameters are whole on every rank, for looking at a model in the middle of training."""

from typing import Any

import torch

from megarq.config.models import RQTransformerConfig
from megarq.parallel.topology import TensorGroup
from megarq.transformer.inputs import FrozenCodebook
from megarq.transformer.rq_transformer import RQTransformer


@torch.no_grad()
def whole_transformer(engine: Any, config: RQTransformerConfig, tp: TensorGroup) -> RQTransformer:
    """The engine's transformer; under ZeRO-3 a copy, gathered parameter by parameter (collective)."""
    module: RQTransformer = engine.module
    if engine.zero_optimization_stage() < 3:
        return module
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    codebooks = [part for part in module.modules() if isinstance(part, FrozenCodebook)]
    shared = all(codebook.shared for codebook in codebooks)
    first = next(module.parameters())
    with torch.device(first.device):
        copy = RQTransformer(config, tp, shared_codebook=shared).to(first.dtype)
    for source, target in zip(module.parameters(), copy.parameters(), strict=True):
        with GatheredParameters([source]):
            target.copy_(source)
    if codebooks:
        copy.load_codebook(codebooks[0].vectors)
    return copy.eval()
