"""A model whose parameters are whole on a rank, for looking at it in the middle of training."""

from typing import Any

import torch
import torch.distributed as dist

from megarq.parallel.topology import ProcessGroups
from megarq.rqvae.model import RQVAE
from megarq.transformer.rq_transformer import RQTransformer
from megarq.transformer.stages import Stage


@torch.no_grad()
def whole_transformer(engine: Any, module: Stage, groups: ProcessGroups, rqvae: RQVAE) -> RQTransformer | None:
    """The engine's transformer; where ZeRO-3 or a pipeline cuts it, a copy gathered parameter by parameter.

    Collective. The copy of a pipeline is made on its first stage, None on the others. Tensor-parallel ranks each get
    their slice. `rqvae` gives the copy its codebook, in fp32 as the engine's.
    """
    sharded = engine.zero_optimization_stage() == 3
    if not sharded and groups.topology.pp == 1:
        assert isinstance(module, RQTransformer)
        return module
    if groups.topology.pipeline_rank > 0:
        _send(module, groups)
        return None
    first = next(module.parameters())
    with torch.device(first.device):
        copy = RQTransformer(module.config, groups.tensor, shared_codebook=rqvae.config.shared_codebook)
    for parameter in copy.parameters():
        parameter.data = parameter.data.to(first.dtype)
    if sharded:
        _gather(module, copy)
    else:
        _receive(module, copy, groups)
    copy.load_codebook(rqvae.codebook_weights())
    return copy.eval()


def _gather(module: Stage, copy: RQTransformer) -> None:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    for name, source in module.named_parameters():
        with GatheredParameters([source]):
            copy.get_parameter(name).copy_(source)


def _receive(module: Stage, copy: RQTransformer, groups: ProcessGroups) -> None:
    """On the first stage: its own parameters, then those of each stage after it."""
    own = dict(module.named_parameters())
    for stage, names in enumerate(_names_by_stage(module, groups)):
        for name in names:
            target = copy.get_parameter(name).data
            if stage == 0:
                target.copy_(own[name])
            else:
                dist.recv(target, groups.topology.on_stage(stage), group=groups.pipeline)


def _send(module: Stage, groups: ProcessGroups) -> None:
    _names_by_stage(module, groups)
    for _, parameter in module.named_parameters():
        dist.send(parameter.data.contiguous(), groups.topology.on_stage(0), group=groups.pipeline)


def _names_by_stage(module: Stage, groups: ProcessGroups) -> list[list[str]]:
    names: list[Any] = [None] * groups.topology.pp
    dist.all_gather_object(names, [name for name, _ in module.named_parameters()], group=groups.pipeline)
    return names
