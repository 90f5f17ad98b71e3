"""A training engine's state, into and out of the checkpoint format.

Saved: fp32 master weights, Adam's moments, the moving average of the weights if kept, and the module's buffers (of
rank 0: they agree on all ranks). Nothing random is saved: randomness is a function of the seed and the step.
"""

from typing import Any

import torch
from torch import Tensor

from megarq.checkpoint.format import Checkpoint, Fragment
from megarq.engine.fragments import MOMENTS, Fragments
from megarq.errors import CheckpointError
from megarq.parallel.topology import TensorGroup


class EngineState:
    """What a DeepSpeed engine must not lose."""

    def __init__(self, engine: Any, tp: TensorGroup, ema_decay: float | None, rank: int) -> None:
        """`ema_decay` is that of the moving average of the weights, None for none; `rank` 0 saves the buffers."""
        self.fragments = Fragments(engine, tp)
        self._engine = engine
        self._tp = tp
        self._rank = rank
        self._ema_decay = ema_decay
        self._ema = {item.name: item.master.detach().clone() for item in self.fragments.items} if ema_decay else {}

    @torch.no_grad()
    def update_ema(self) -> None:
        """ema <- decay * ema + (1 - decay) * weights, after each optimiser step."""
        if self._ema_decay is not None:
            for item in self.fragments.items:
                self._ema[item.name].lerp_(item.master, 1 - self._ema_decay)

    def tensors(self) -> dict[str, tuple[Fragment, Tensor]]:
        """This rank's fragments, keyed "<kind>/<name>". Uncut parameters are saved by the first tensor rank alone."""
        tensors: dict[str, tuple[Fragment, Tensor]] = {}
        for item in self.fragments.items:
            if item.place.parts == 1 and self._tp.rank > 0:
                continue
            tensors[f"param/{item.name}"] = (item.place, item.master)
            for kind in MOMENTS:
                tensors[f"{kind}/{item.name}"] = (item.place, item.moment(self.fragments.optimizer, kind))
            if self._ema:
                tensors[f"ema/{item.name}"] = (item.place, self._ema[item.name])
        if self._rank == 0:
            tensors |= {
                f"buffer/{name}": (Fragment(tuple(buffer.shape)), buffer) for name, buffer in self._buffers().items()
            }
        return tensors

    def metadata(self) -> dict[str, Any]:
        """What is saved beside the tensors."""
        return {"optimizer_step": self.fragments.optimizer_step()}

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint saved under any layout. Raises CheckpointError where it is of another model."""
        wanted = {name for name, p in self._engine.module.named_parameters() if p.requires_grad}
        saved = set(checkpoint.names("param"))
        if wanted != saved:
            names = ", ".join(sorted(wanted ^ saved)[:5])
            raise CheckpointError(
                f"{checkpoint.folder} holds the parameters of another model (they differ in {names}). "
                "Resume with the configuration that the run was started with."
            )
        self.fragments.create_moments(checkpoint.metadata["optimizer_step"])
        items = {item.name: item for item in self.fragments.items}
        has_ema = bool(checkpoint.names("ema"))
        for name in sorted(wanted):
            full = checkpoint.tensor(name)
            self._check_shape(name, full, checkpoint)
            self.fragments.write_parameter(name, full)
            if item := items.get(name):
                item.master.data.copy_(item.of(full))
                for kind in MOMENTS:
                    moment = item.moment(self.fragments.optimizer, kind)
                    moment.copy_(item.of(checkpoint.tensor(name, kind)))
                if self._ema:
                    self._ema[name].copy_(item.of(checkpoint.tensor(name, "ema") if has_ema else full))
        for name, buffer in self._buffers().items():
            buffer.copy_(checkpoint.tensor(name, "buffer"))

    def _check_shape(self, name: str, full: Tensor, checkpoint: Checkpoint) -> None:
        parameter = self._engine.module.get_parameter(name)
        local = list(getattr(parameter, "ds_shape", parameter.shape))
        dim = getattr(parameter, "partition_dim", None)
        if dim is not None:
            local[dim] *= self._tp.size
        if list(full.shape) != local:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} has shape {list(full.shape)}, the model's is {local}. "
                "Resume with the configuration that the run was started with."
            )

    def _buffers(self) -> dict[str, Tensor]:
        persistent = self._engine.module.state_dict(keep_vars=True)
        return {name: buffer for name, buffer in self._engine.module.named_buffers() if name in persistent}
