"""A training engine's state, into and out of the checkpoint format.

Saved: fp32 master weights, Adam's moments, the moving average of the weights if kept, and the module's buffers (of the
first rank of each stage: they agree on the others). Nothing random is saved: randomness is a function of the seed and
the step. What is trained beside the engine is saved under names of its own.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from megarq.checkpoint.format import Checkpoint, Fragment
from megarq.engine.fragments import MOMENTS, Fragments, LocalFragment
from megarq.engine.pipeline import trained_module
from megarq.errors import CheckpointError
from megarq.parallel.together import gather_objects, together
from megarq.parallel.topology import ProcessGroups


class Beside(Protocol):
    """What is trained beside the engine, whole and the same on all ranks."""

    @property
    def name(self) -> str:
        """What all its tensors' names begin with, before a full stop."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What must not be lost, keyed "<kind>/<name>"."""
        ...

    def metadata(self) -> dict[str, Any]:
        """What is saved beside the tensors."""
        ...

    def load(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint, of a run without it too."""
        ...


class EngineState:
    """What a DeepSpeed engine must not lose."""

    def __init__(
        self, engine: Any, groups: ProcessGroups, ema_decay: float | None, beside: Beside | None = None
    ) -> None:
        """`ema_decay` is that of the moving average of the weights, None for none."""
        self._beside = beside
        self.fragments = Fragments(engine, groups.tensor)
        self.module = trained_module(engine)
        self._groups = groups
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
        for item in self._own():
            tensors[f"param/{item.name}"] = (item.place, item.master)
            for kind in MOMENTS:
                tensors[f"{kind}/{item.name}"] = (item.place, item.moment(self.fragments.optimizer, kind))
            if self._ema:
                tensors[f"ema/{item.name}"] = (item.place, self._ema[item.name])
        whole = self._whole().items()
        return tensors | {key: (Fragment(tuple(tensor.shape)), tensor) for key, tensor in whole}

    def saved_bytes(self) -> int:
        """Of this rank's tensors in a checkpoint; known before the first step makes Adam's moments."""
        kinds = 1 + len(MOMENTS) + bool(self._ema)
        own = sum(kinds * item.master.nbytes for item in self._own())
        return own + sum(tensor.nbytes for tensor in self._whole().values())

    def _own(self) -> list[LocalFragment]:
        """The fragments that this rank saves."""
        return [item for item in self.fragments.items if item.place.parts > 1 or self._groups.tensor.rank == 0]

    def _whole(self) -> dict[str, Tensor]:
        """What the first rank of each stage saves for all."""
        if self._groups.topology.data_rank or self._groups.topology.tensor_rank:
            return {}
        return {f"buffer/{name}": buffer for name, buffer in self._buffers().items()} | self.beside_tensors()

    def beside_tensors(self) -> dict[str, Tensor]:
        """What is trained beside the engine, keyed "<kind>/<name>"."""
        return self._beside.tensors() if self._beside is not None else {}

    def metadata(self) -> dict[str, Any]:
        """What is saved beside the tensors."""
        metadata: dict[str, Any] = {"optimizer_step": self.fragments.optimizer_step()}
        if self._beside is not None:
            metadata |= {"beside": [self._beside.name], **self._beside.metadata()}
        return metadata

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint saved under any layout (collective); each rank reads its own numbers alone.

        Raises CheckpointError on all ranks where it is of another model or damaged.
        """
        others = tuple(f"{name}." for name in checkpoint.metadata.get("beside", []))
        saved = {name for name in checkpoint.names("param") if not name.startswith(others)}
        trained = [name for name, p in self.module.named_parameters() if p.requires_grad]
        wanted = {name for names in gather_objects(trained) for name in names}
        if wanted != saved:
            names = ", ".join(sorted(wanted ^ saved)[:5])
            raise CheckpointError(
                f"{checkpoint.folder} holds the parameters of another model (they differ in {names}). "
                "Resume with the configuration that the run was started with."
            )
        self.fragments.create_moments(checkpoint.metadata["optimizer_step"])
        together(lambda: self._read(checkpoint))
        checkpoint.close()
        self.fragments.refresh_parameters(self._groups.data)

    def _read(self, checkpoint: Checkpoint) -> None:
        averaged = bool(checkpoint.names("ema"))
        for item in self.fragments.items:
            targets = {"param": item.master.data}
            targets |= {kind: item.moment(self.fragments.optimizer, kind) for kind in MOMENTS}
            if self._ema:
                targets["ema"] = self._ema[item.name]
            for kind, target in targets.items():
                stored = "param" if kind == "ema" and not averaged else kind
                target.copy_(checkpoint.read(item.name, stored, item.place, target.numel()))
        for name, buffer in self._buffers().items():
            buffer.copy_(checkpoint.tensor(name, "buffer"))
        if self._beside is not None:
            self._beside.load(checkpoint)

    def _buffers(self) -> dict[str, Tensor]:
        persistent = self.module.state_dict(keep_vars=True)
        return {name: buffer for name, buffer in self.module.named_buffers() if name in persistent}
