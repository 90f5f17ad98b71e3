"""Initial weights that depend on the seed and a parameter's name alone: the same for every tp, pp and order."""

import hashlib

import torch
from torch import Tensor

from megarq.parallel.topology import TensorGroup


def derived_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for one named purpose; different names give unrelated streams."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def named_generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator of the derived seed."""
    return torch.Generator().manual_seed(derived_seed(seed, *names))


@torch.no_grad()
def fill_normal(parameter: Tensor, std: float, seed: int, name: str, tp: TensorGroup) -> None:
    """Fill with this rank's slice of the full tensor of N(0, std^2) that (seed, name) stands for."""
    dim = getattr(parameter, "partition_dim", None)
    shape = list(parameter.shape)
    if dim is not None:
        shape[dim] *= tp.size
    full = torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=named_generator(seed, name))
    parameter.copy_(full if dim is None else full.chunk(tp.size, dim)[tp.rank])
