"""Linear layers and embeddings cut over a tensor group.

Y = X A + b. Cut by columns, A = [A_1 .. A_P]: rank p holds A_p and gives Y_p = X A_p, a slice of Y. Cut by rows,
A = [A_1; ..; A_P] and X = [X_1 .. X_P]: rank p gives X_p A_p, and Y = sum_p X_p A_p + b. A column layer, anything
pointwise, and a row layer need one all-reduce forward (in `reduce_from`) and one backward (in `copy_to`).

torch stores A transposed, so columns of A are dimension 0 of `weight`. A cut parameter carries `partition_dim`, the
dimension that is cut, from which initialisation and checkpoints know its place in the full tensor.
Constructors leave weights uninitialised: `initialization.initialize` fills them, the same for every P.

Shapes: N tokens (any leading dimensions), P tensor-parallel size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarq.errors import ConfigError
from megarq.parallel.collectives import copy_to, reduce_from
from megarq.parallel.topology import ALONE, TensorGroup


def cut_size(size: int, tp: TensorGroup, what: str) -> int:
    """A rank's share of `size`; ConfigError where the tensor group does not divide it."""
    if size % tp.size:
        raise ConfigError(f"{what}={size} is not divisible by parallel.tp={tp.size}. Choose a tp that divides it.")
    return size // tp.size


def cut_parameter(shape: tuple[int, ...], dim: int, tp: TensorGroup) -> nn.Parameter:
    """An uninitialised parameter, marked for DeepSpeed's norms and for checkpoints where it is cut along `dim`."""
    parameter = nn.Parameter(torch.empty(shape))
    if tp.size > 1:
        parameter.partition_dim = dim  # type: ignore[attr-defined]
        parameter.model_parallel = True  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    return parameter


class ColumnParallelLinear(nn.Module):
    """[N, in] to this rank's slice [N, out/P]; `copy_to` makes the input's gradient whole."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.tp = tp
        local = cut_size(out_features, tp, "output features")
        self.weight = cut_parameter((local, in_features), 0, tp)
        self.bias = cut_parameter((local,), 0, tp) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(copy_to(x, self.tp), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """This rank's slice [N, in/P] to the whole [N, out]; the bias is added once, after the sum."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.tp = tp
        self.weight = cut_parameter((out_features, cut_size(in_features, tp, "input features")), 1, tp)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.linear(x, self.weight, self.bias)
        y = reduce_from(F.linear(x, self.weight), self.tp)
        return y if self.bias is None else y + self.bias


class QKVParallelLinear(nn.Module):
    """Queries, keys and values in one product, cut by heads: [N, E] to three of [N, E/P].

    The weight is [3, E, E], so that a cut along dimension 1 gives each rank whole heads of all three.
    """

    def __init__(self, embed_dim: int, bias: bool = True, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.tp = tp
        local = cut_size(embed_dim, tp, "model.embed_dim")
        self.weight = cut_parameter((3, local, embed_dim), 1, tp)
        self.bias = cut_parameter((3, local), 1, tp) if bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = None if self.bias is None else self.bias.flatten()
        q, k, v = F.linear(copy_to(x, self.tp), self.weight.flatten(0, 1), bias).chunk(3, dim=-1)
        return q, k, v


class DepthParallelLinear(nn.Module):
    """A ColumnParallelLinear for each depth: [..., D, in] to [..., D, out/P]."""

    def __init__(self, depth: int, in_features: int, out_features: int, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.tp = tp
        local = cut_size(out_features, tp, "output features")
        self.weight = cut_parameter((depth, local, in_features), 1, tp)
        self.bias = cut_parameter((depth, local), 1, tp)

    def forward(self, x: Tensor, depths: slice = slice(None)) -> Tensor:
        """`depths` are those that x's dimension -2 stands for; all of them by default."""
        x = copy_to(x, self.tp)
        return torch.einsum("...de,dke->...dk", x, self.weight[depths]) + self.bias[depths]


class VocabParallelEmbedding(nn.Module):
    """Embeddings of [N] tokens as [N, E]; rank p holds rows p V/P to (p+1) V/P and answers 0 for the others."""

    def __init__(self, vocab_size: int, embed_dim: int, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.tp = tp
        local = cut_size(vocab_size, tp, "model.cond_vocab_size")
        self.first = tp.rank * local
        self.weight = cut_parameter((local, embed_dim), 0, tp)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.first
        foreign = (local < 0) | (local >= self.weight.shape[0])
        embedded = F.embedding(local.masked_fill(foreign, 0), self.weight)
        return reduce_from(embedded.masked_fill(foreign.unsqueeze(-1), 0), self.tp)
