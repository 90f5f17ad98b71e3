"""Initial weights that depend on the seed and a parameter's name alone: the same for every tp, pp and order."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from megarq.parallel.topology import ALONE, TensorGroup


def derived_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for one named purpose; different names give unrelated streams."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def named_generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator of the derived seed."""
    return torch.Generator().manual_seed(derived_seed(seed, *names))


def normal_values(
    shape: Sequence[int], std: float, seed: int, name: str, tp: TensorGroup = ALONE, dim: int | None = None
) -> Tensor:
    """This rank's slice, of `shape`, of the full tensor of N(0, std^2) that (seed, name) stands for.

    `dim` is the dimension that is cut over the tensor group, None where the tensor is whole on every rank.
    """
    full = list(shape)
    if dim is not None:
        full[dim] *= tp.size
    values = torch.empty(full).normal_(0.0, std, generator=named_generator(seed, name))
    return values if dim is None else values.chunk(tp.size, dim)[tp.rank]
