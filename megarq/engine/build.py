"""From a module and a configuration to a DeepSpeed engine."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megarq.config.run import TrainConfig
from megarq.parallel.topology import ProcessGroups


class ModelParallelUnit:
    """What DeepSpeed asks about tensor parallelism (its `mpu` argument)."""

    def __init__(self, groups: ProcessGroups) -> None:
        self._topology = groups.topology
        self._tensor = groups.tensor.group
        self._data = groups.data

    def get_model_parallel_rank(self) -> int:
        """Place along the tensor axis."""
        return self._topology.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Tensor-parallel size."""
        return self._topology.tp

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks that share each layer."""
        return self._tensor

    def get_data_parallel_rank(self) -> int:
        """Place along the data axis."""
        return self._topology.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Data-parallel size."""
        return self._topology.dp

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks that hold the same slice of the model."""
        return self._data

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def build_engine(
    module: nn.Module,
    train: TrainConfig,
    ds: Mapping[str, Any],
    groups: ProcessGroups,
    decayed: Callable[[str], bool],
    device: torch.device,
) -> Any:
    """A DeepSpeedEngine that trains the module with AdamW.

    Args:
        module: initialised parameters, on any device.
        train: learning rate, betas, weight decay.
        ds: DeepSpeed's configuration, complete (`resolve_ds_config`).
        groups: this rank's process groups; the default group exists already.
        decayed: whether a parameter of this name has weight decay.
        device: where to train.
    """
    deepspeed = import_deepspeed(device)
    optimizer = torch.optim.AdamW(
        parameter_groups(module, train.weight_decay, decayed),
        lr=train.lr,
        betas=(train.betas[0], train.betas[1]),
        fused=device.type == "cuda",
    )
    engine, *_ = deepspeed.initialize(
        model=module.to(device),
        optimizer=optimizer,
        config=dict(ds),
        mpu=ModelParallelUnit(groups) if groups.tensor.size > 1 else None,
        dist_init_required=False,
    )
    return engine


def parameter_groups(module: nn.Module, weight_decay: float, decayed: Callable[[str], bool]) -> list[dict[str, Any]]:
    """Two groups: with weight decay and without; an empty one is left out."""
    chosen: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            chosen[decayed(name)].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decay else 0.0}
        for decay, parameters in chosen.items()
        if parameters
    ]


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, and without compiling its shared-memory communication operator on a CPU."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
