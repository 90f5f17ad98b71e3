"""Comparing what must be the same on several ranks: a flipped bit is found, and named, before it is saved."""

import torch
import torch.distributed as dist
from torch import Tensor

from megarq.engine.fragments import is_sharded
from megarq.engine.state import EngineState
from megarq.parallel.together import gather_objects
from megarq.parallel.topology import ProcessGroups

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Replicas:
    """The copies of a run's tensors.

    Data-parallel ranks hold the same buffers, what is trained beside the engine, and, unless ZeRO-3 cuts them, the same
    parameters. Tensor-parallel ranks hold the same numbers of each parameter that is not cut over them.
    """

    def __init__(self, state: EngineState, groups: ProcessGroups) -> None:
        """Looks at all that `state` would save, and at the parameters that are trained with."""
        self._state, self._groups = state, groups

    @torch.no_grad()
    def differing(self) -> str | None:
        """Which rank holds other numbers than the ranks that it should agree with, and of what; None where none does.

        Collective, and the same answer on all ranks.
        """
        topology, found = self._groups.topology, []
        if topology.dp > 1:
            found += self._compare(self._over_data(), self._groups.data, "data")
        if topology.tp > 1:
            found += self._compare(self._over_tensor(), self._groups.tensor.group, "tensor")
        everywhere = sorted({sentence for sentences in gather_objects(found) for sentence in sentences})
        return "; ".join(everywhere[:3]) or None

    def _over_data(self) -> dict[str, Tensor]:
        module = self._state.module
        tensors = {name: p.data for name, p in module.named_parameters() if not is_sharded(p)}
        return tensors | dict(module.named_buffers()) | self._state.beside_tensors()

    def _over_tensor(self) -> dict[str, Tensor]:
        return {item.name: item.master for item in self._state.fragments.items if item.place.parts == 1}

    def _compare(self, tensors: dict[str, Tensor], group: dist.ProcessGroup | None, axis: str) -> list[str]:
        """Sentences about members of this rank's line along an axis that differ from most of it."""
        if not tensors:
            return []
        line = next(line for line in self._groups.topology.lines(axis) if self._groups.topology.rank in line)
        own = torch.stack([checksum(tensor) for tensor in tensors.values()])
        all_sums = torch.empty(len(line), len(own), dtype=own.dtype, device=own.device)
        dist.all_gather_into_tensor(all_sums, own[None], group=group)
        differ = (all_sums != all_sums[:1]).any(0).tolist()
        if len(line) == 2:  # which of the two is wrong, nobody knows
            wrong = [name for name, differs in zip(tensors, differ, strict=True) if differs]
            return [f"ranks {line[0]} and {line[1]} hold different numbers of {', '.join(wrong[:3])}"] if wrong else []
        usual = all_sums.mode(0).values
        return [
            f"rank {rank} holds other numbers of {', '.join(wrong[:3])} than the {axis}-parallel ranks beside it"
            for rank, sums in zip(line, all_sums, strict=True)
            if (wrong := [name for name, differs in zip(tensors, sums != usual, strict=True) if differs])
        ]


def checksum(tensor: Tensor) -> Tensor:
    """The sum [] of a tensor's bits as integers, int64: any one bit changes it."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)
