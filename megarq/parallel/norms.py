"""LayerNorm whose kernel can be replaced, and whose tokens may be cut over a tensor group."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarq.parallel.collectives import copy_to
from megarq.parallel.topology import ALONE, TensorGroup

EPS = 1e-5


class LayerNorm(nn.Module):
    """[..., E] to [..., E].

    `tp` is given where each rank normalises its slice of the tokens (sequence parallelism): the parameters' gradients,
    each of a slice, are then summed over the ranks. Where every rank sees all tokens it is left ALONE.
    """

    def __init__(self, width: int, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.kernel: Callable[..., Tensor] = F.layer_norm
        """What computes it, called as F.layer_norm is."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if self.tp.sequence:
            weight, bias = copy_to(torch.stack((weight, bias)), self.tp)  # one all-reduce for both
        return self.kernel(x, weight.shape, weight, bias, EPS)
