"""The numbers that a DeepSpeed engine holds on this rank, and where they lie in the full tensors.

ZeRO flattens the parameters of a group, cuts the flat tensor over the data-parallel ranks and keeps fp32 master weights
and Adam's moments of its own part. The links from a parameter to its part are DeepSpeed's private names: all of them
are in this file, behind `Fragments`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megarq.checkpoint.format import Fragment
from megarq.parallel.topology import TensorGroup

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class LocalFragment:
    """This rank's part of one parameter."""

    name: str
    parameter: nn.Parameter
    place: Fragment
    master: Tensor
    """fp32 master weights, a view [n] into the engine's flat partition."""
    flat: Tensor
    """The flat partition that the optimiser steps on."""
    offset: int
    """First number of `master` in `flat`."""

    def moment(self, optimizer: torch.optim.Optimizer, kind: str) -> Tensor:
        """A view [n] of one of Adam's moments."""
        return optimizer.state[self.flat][kind].view(-1)[self.offset : self.offset + self.master.numel()]

    def of(self, full: Tensor) -> Tensor:
        """This rank's numbers [n] of a full tensor."""
        values = self.place.slice_of(full).reshape(-1)
        return values[self.place.start : self.place.start + self.master.numel()]


class Fragments:
    """All parts of parameters that this rank's optimiser owns."""

    def __init__(self, engine: Any, tp: TensorGroup) -> None:
        """`engine` is a DeepSpeedEngine with ZeRO stage 1, 2 or 3."""
        self._engine = engine
        self._tp = tp
        self.sharded_parameters = engine.zero_optimization_stage() == 3
        self.optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
        self.items = list(self._partitioned() if self.sharded_parameters else self._replicated())

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self._engine.module.named_parameters() if p.requires_grad)

    def _place(self, parameter: nn.Parameter, shape: torch.Size, start: int) -> Fragment:
        dim = getattr(parameter, "partition_dim", None)
        if dim is None:
            return Fragment(tuple(shape), start=start)
        full = list(shape)
        full[dim] *= self._tp.size
        return Fragment(tuple(full), dim, self._tp.rank, self._tp.size, start)

    def _replicated(self) -> Iterator[LocalFragment]:
        """ZeRO-1 and 2: whole parameters everywhere, each rank's masters are one range of the flattened group."""
        for name, parameter in self._named():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue
            flat = self.optimizer.param_groups[mapping.param_group_index]["params"][0]
            yield LocalFragment(
                name,
                parameter,
                self._place(parameter, parameter.shape, mapping.lp_fragment_address.start),
                mapping.hp_fragment,
                flat,
                mapping.hp_fragment_address.start,
            )

    def _partitioned(self) -> Iterator[LocalFragment]:
        """ZeRO-3: each parameter is cut by itself into equal parts, the last ones padded."""
        zero = self._engine.optimizer
        for name, parameter in self._named():
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            flat = zero.fp32_partitioned_groups_flat[group]
            start = zero._get_param_partition_rank(parameter) * size
            own = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
            if own <= 0:
                continue
            master = flat.view(-1)[offset : offset + own]
            place = self._place(parameter, parameter.ds_shape, start)  # type: ignore[attr-defined]
            yield LocalFragment(name, parameter, place, master, flat, offset)

    def optimizer_step(self) -> int:
        """Updates that Adam has made."""
        for state in self.optimizer.state.values():
            if "step" in state:
                return int(state["step"])
        return 0

    def create_moments(self, step: int) -> None:
        """Give the optimiser its state, zero, as after `step` updates; the engine creates it only in its first step."""
        for flat in {id(item.flat): item.flat for item in self.items}.values():
            self.optimizer.state[flat] = {
                "step": torch.tensor(float(step), device=flat.device if _fused(self.optimizer) else "cpu"),
                **{kind: torch.zeros_like(flat) for kind in MOMENTS},
            }

    @torch.no_grad()
    def write_parameter(self, name: str, full: Tensor) -> None:
        """Set the module's own (bf16 or fp32) parameter from the full tensor, whichever part of it is held here."""
        parameter = self._engine.module.get_parameter(name)
        place = self._place(parameter, getattr(parameter, "ds_shape", parameter.shape), 0)
        local = place.slice_of(full)
        if not self.sharded_parameters:
            parameter.data.copy_(local)
            return
        partition = parameter.ds_tensor
        size = partition.ds_numel
        start = self._engine.optimizer._get_param_partition_rank(parameter) * size
        values = local.reshape(-1)[start : start + size]
        partition.data[: values.numel()].copy_(values)
        if parameter.data.numel() == local.numel():
            parameter.data.copy_(local)


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))
