"""From a module and a configuration to a DeepSpeed engine."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from megarq.config.deepspeed import zero_stage
from megarq.config.run import TrainConfig
from megarq.engine.fragments import is_sharded
from megarq.engine.kernels import Kernels, choose_kernels
from megarq.engine.pipeline import pipeline_module
from megarq.parallel.topology import ProcessGroups
from megarq.transformer.blocks import Block


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


@contextmanager
def construction(
    ds: Mapping[str, Any], groups: ProcessGroups, device: torch.device, enabled: bool = True
) -> Iterator[None]:
    """While the body builds a module, give each layer's parameters their place as soon as the layer joins its parent.

    They go to the device in the training precision; for ZeRO-3 they are cut there, and no rank ever holds more than its
    part and one layer. `fragments.write_sharded` gives them their values. Buffers stay as they are.

    Args:
        ds: DeepSpeed's configuration, complete.
        groups: this rank's process groups; parameters are cut over its data-parallel ranks.
        device: where to train.
        enabled: `parallel.sharded_init`, whether to cut.
    """
    sharded = enabled and zero_stage(ds) == 3
    if sharded:
        deepspeed = import_deepspeed(device)
        deepspeed.init_distributed(dist_init_required=False)
    dtype = torch.bfloat16 if ds["bf16"]["enabled"] else torch.float32
    first: Any = None

    def place(parent: nn.Module, name: str, layer: nn.Module | None) -> None:
        nonlocal first
        whole = [p for p in layer.parameters() if not is_sharded(p)] if layer is not None else []
        for parameter in whole:
            parameter.data = parameter.data.to(device, dtype)
        if not sharded or not whole:
            return
        if first is None:
            mpu = _mpu(groups)
            data = groups.data if mpu else None
            deepspeed.zero.Init(layer, data_parallel_group=data, config_dict_or_path=dict(ds), mpu=mpu)
            first = whole[0]
        else:
            first.convert_to_zero_parameters(param_list=whole)

    hook = register_module_module_registration_hook(place)
    try:
        yield
    finally:
        hook.remove()


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
        train: learning rate, betas, weight decay, kernels.
        ds: DeepSpeed's configuration, complete (`resolve_ds_config`).
        groups: this rank's process groups; the default group exists already.
        decayed: whether a parameter of this name has weight decay.
        device: where to train.
    """
    deepspeed = import_deepspeed(device)
    deepspeed.init_distributed(dist_init_required=False)
    module.to(device)
    optimizer = prepare(module, train, decayed, choose_kernels(train.kernels, device, ds))
    with redirect_stdout(StringIO()):  # its bf16 optimiser prints the memory in use at every turn
        engine, *_ = deepspeed.initialize(
            model=module if groups.topology.pp == 1 else pipeline_module(module, groups.topology),
            optimizer=optimizer,
            config=dict(ds),
            mpu=_mpu(groups),
            dist_init_required=False,
        )
    return engine


def prepare(
    module: nn.Module, train: TrainConfig, decayed: Callable[[str], bool], kernels: Kernels
) -> torch.optim.Optimizer:
    """AdamW for the module, whose norms have their kernels and whose blocks are compiled where that is asked for."""
    kernels.apply(module)
    if train.compile:
        for layer in module.modules():
            if isinstance(layer, Block):
                layer.compile(dynamic=False)  # body and head have one length each: two graphs, nothing to generalise
    return kernels.adamw(
        parameter_groups(module, train.weight_decay, decayed), lr=train.lr, betas=(train.betas[0], train.betas[1])
    )


def _mpu(groups: ProcessGroups) -> ModelParallelUnit | None:
    """A pipeline's engine takes its groups from the pipeline module instead."""
    return ModelParallelUnit(groups) if groups.tensor.size > 1 and groups.topology.pp == 1 else None


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


def take_monitor(engine: Any) -> Any:
    """DeepSpeed's monitor where ds_config turns one on, else None. The engine itself does not write to it any more.

    Its own lines count samples where ours count steps, and Weights & Biases takes no line of an earlier step.
    """
    monitor = engine.monitor
    wanted, monitor.enabled = monitor.enabled, False
    return monitor if wanted else None
