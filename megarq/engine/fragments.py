"""The numbers that a DeepSpeed engine holds on this rank, and where they lie in the full tensors.

ZeRO flattens the parameters of a group, cuts the flat tensor over the data-parallel ranks and keeps fp32 master weights
and Adam's moments of its own part. The links from a parameter to its part are DeepSpeed's private names: all of them
are in this file, behind `Fragments`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megarq.checkpoint.format import Fragment
from megarq.engine.pipeline import trained_module
from megarq.parallel.topology import TensorGroup

MOMENTS = ("exp_avg", "exp_avg_sq")


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has cut the parameter over the data-parallel ranks."""
    return hasattr(parameter, "ds_id")


@torch.no_grad()
def write_sharded(parameter: Any, value: Tensor) -> None:
    """Set a parameter, cut by ZeRO-3 or not, from this tensor rank's whole value; before or in training."""
    if not is_sharded(parameter):
        parameter.data.copy_(value)
        return
    size = parameter.ds_tensor.ds_numel
    own = value.reshape(-1)[parameter.ds_zero_partition_rank * size :][:size]
    parameter.ds_tensor.data[: own.numel()].copy_(own)
    parameter.ds_secondary_tensor = None  # hpZ's copy inside a node: made anew from ds_tensor when next gathered
    if parameter.data.numel() == value.numel():
        parameter.data.copy_(value)


@dataclass
class LocalFragment:
    """This rank's part of one parameter."""

    name: str
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
        return ((name, p) for name, p in trained_module(self._engine).named_parameters() if p.requires_grad)

    def _place(self, parameter: nn.Parameter, shape: torch.Size, start: int) -> Fragment:
        dim = getattr(parameter, "partition_dim", None)
        return Fragment.of_slice(shape, dim, self._tp.rank, self._tp.size, start)

    def _replicated(self) -> Iterator[LocalFragment]:
        """ZeRO-1 and 2: whole parameters everywhere, each rank's masters are one range of the flattened group."""
        for name, parameter in self._named():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue
            flat = self.optimizer.param_groups[mapping.param_group_index]["params"][0]
            yield LocalFragment(
                name,
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
            yield LocalFragment(name, place, master, flat, offset)

    def optimizer_step(self) -> int:
        """Updates that Adam has made: torch's counts them for each tensor, apex's for each group."""
        counters = (*self.optimizer.state.values(), *self.optimizer.param_groups)
        return next((int(counter["step"]) for counter in counters if "step" in counter), 0)

    def create_moments(self, step: int) -> None:
        """Give the optimiser its state, zero, as after `step` updates; the engine creates it only in its first step."""
        for flat in {id(item.flat): item.flat for item in self.items}.values():
            held = self.optimizer.state[flat]  # by a run that goes back: its memory serves again
            self.optimizer.state[flat] = {
                kind: held[kind].zero_() if kind in held else torch.zeros_like(flat) for kind in MOMENTS
            }
            if isinstance(self.optimizer, torch.optim.AdamW):
                device = flat.device if self.optimizer.defaults["fused"] else "cpu"
                self.optimizer.state[flat]["step"] = torch.tensor(float(step), device=device)
        if not isinstance(self.optimizer, torch.optim.AdamW):
            for group in self.optimizer.param_groups:
                group["step"] = step

    @torch.no_grad()
    def refresh_parameters(self, group: ProcessGroup | None) -> None:
        """Set the module's own (bf16 or fp32) parameters from the masters of all ranks of the data-parallel `group`."""
        items = {item.name: item for item in self.items}
        for name, parameter in self._named():
            item, whole = items.get(name), parameter.data
            if self.sharded_parameters:
                parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]
                if item is not None:
                    parameter.ds_tensor.data[: item.master.numel()].copy_(item.master)  # type: ignore[attr-defined]
                if parameter.ds_status.name != "AVAILABLE":  # type: ignore[attr-defined]
                    continue
            # Each number is on one rank alone: with zeros elsewhere their sum is the whole parameter, exactly.
            whole.zero_()
            if item is not None:
                whole.view(-1)[item.place.start :][: item.master.numel()].copy_(item.master)
            dist.all_reduce(whole, group=group)
