"""Linear layers and embeddings cut over a tensor group.

Y = X A + b. Cut by columns, A = [A_1 .. A_P]: rank p holds A_p and gives Y_p = X A_p, a slice of Y. Cut by rows,
A = [A_1; ..; A_P] and X = [X_1 .. X_P]: rank p gives X_p A_p, and Y = sum_p X_p A_p + b. A column layer, anything
pointwise, and a row layer need one all-reduce forward (in `reduce_from`) and one backward, of X's gradient, which
runs while the gradient of A_p is computed. Under sequence parallelism (see `collectives`) X and Y are cut by tokens
where they are not cut by A: the column layer gathers X, forward and again backward, and the row layer scatters Y.

torch stores A transposed, so columns of A are dimension 0 of `weight`. A cut parameter carries `partition_dim`, the
dimension that is cut, from which initialisation and checkpoints know its place in the full tensor.
Constructors leave weights uninitialised: `NamedParameters.initialize` fills them, the same for every P.

Shapes: N tokens (any leading dimensions), B sequences of S tokens, n tokens of this rank's slice, E width, P
tensor-parallel size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarq.errors import ConfigError
from megarq.parallel.collectives import (
    copy_to,
    reduce_from,
    scatter_tokens,
    start_all_reduce,
    start_gather,
    start_scatter,
)
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


class _ColumnLinear(torch.autograd.Function):
    """F.linear whose input's gradient is summed over the ranks while the weight's is computed.

    The weight may have more dimensions than two; all but the last are outputs. Kept for the backward pass are the
    parameter itself, so that ZeRO-3 can free and gather its data in between, and the input as it came: under
    sequence parallelism the slice, whose gathering runs behind the product that gives the input's gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorGroup, tokens: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tp, ctx.tokens = tp, tokens
        whole = start_gather(x, tp, tokens)() if tokens else x
        return F.linear(whole, weight.flatten(0, -2), None if bias is None else bias.flatten())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad, tp, tokens = grads[0], ctx.tp, ctx.tokens
        rows = grad.flatten(0, -2)
        gathered = start_gather(x, tp, tokens) if tokens and of_weight else lambda: x
        summed: Callable[[], Tensor | None] = lambda: None  # noqa: E731
        if of_input:
            summed = _start_sum((rows @ weight.flatten(0, -2)).unflatten(0, grad.shape[:-1]), tp, tokens)
        grad_weight = (rows.t() @ gathered().flatten(0, -2)).view(weight.shape) if of_weight else None
        grad_bias = rows.sum(dim=0).view(weight.shape[:-1]) if of_bias else None
        return summed(), grad_weight, grad_bias, None, None


def _start_sum(partial: Tensor, tp: TensorGroup, tokens: int) -> Callable[[], Tensor]:
    """Start to sum over the ranks what each found for the input's gradient; the answer waits for it."""
    if tp.size == 1:
        return lambda: partial
    return start_scatter(partial, tp) if tokens else start_all_reduce(partial, tp)


Product = Callable[[Tensor, Tensor | None], Tensor]
"""A frozen weight: from inputs [.., in] and a bias to [.., out]."""


class FreezableLinear(nn.Module):
    """A linear layer whose weight, for inference, can give way to another form of it."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    frozen: Product | None = None
    """Where given, what is called in place of F.linear with `weight`, which is gone then."""

    def freeze(self, form: Callable[[Tensor], Product], weight: Tensor) -> None:
        """Take this weight, in another form, in the parameter's place."""
        self.frozen = form(weight.flatten(0, -2))
        self.register_parameter("weight", None)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[.., in] to [.., out/P], without communication."""
        return F.linear(x, self.weight, bias) if self.frozen is None else self.frozen(x, bias)


class ColumnParallelLinear(FreezableLinear):
    """[N, in] to this rank's slice [N, out/P].

    With `tokens`, the S of sequence parallelism, the input is this rank's [n, in] and the output [B, S, out/P].
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.tp = tp
        local = cut_size(out_features, tp, "output features")
        self.weight = cut_parameter((local, in_features), 0, tp)
        self.bias = cut_parameter((local,), 0, tp) if bias else None

    def forward(self, x: Tensor, tokens: int = 0) -> Tensor:
        if self.tp.size == 1 or self.frozen is not None:
            return self.product(x, self.bias)
        return _ColumnLinear.apply(x, self.weight, self.bias, self.tp, tokens)


class RowParallelLinear(FreezableLinear):
    """This rank's slice [N, in/P] to the whole [N, out]; the bias is added once, after the sum.

    With `tokens`, the S of sequence parallelism, the input is [B, S, in/P] and the output this rank's [n, out].
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.tp = tp
        self.weight = cut_parameter((out_features, cut_size(in_features, tp, "input features")), 1, tp)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor, tokens: int = 0) -> Tensor:
        if self.tp.size == 1:
            return self.product(x, self.bias)
        y = self.product(x, None)
        y = scatter_tokens(y, self.tp) if tokens else reduce_from(y, self.tp)
        if self.bias is None:
            return y
        return y + (copy_to(self.bias, self.tp) if tokens else self.bias)  # its gradient is then of a slice alone


class QKVParallelLinear(FreezableLinear):
    """Queries, keys and values in one product, cut by heads: [N, E] to three of [N, E/P].

    The weight is [3, E, E], so that a cut along dimension 1 gives each rank whole heads of all three. With `tokens`,
    the S of sequence parallelism, the input is this rank's [n, E] and the outputs are [B, S, E/P].
    """

    def __init__(self, embed_dim: int, bias: bool = True, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.tp = tp
        local = cut_size(embed_dim, tp, "model.embed_dim")
        self.weight = cut_parameter((3, local, embed_dim), 1, tp)
        self.bias = cut_parameter((3, local), 1, tp) if bias else None

    def forward(self, x: Tensor, tokens: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        if self.frozen is None:
            y = _ColumnLinear.apply(x, self.weight, self.bias, self.tp, tokens)
        else:
            y = self.frozen(x, None if self.bias is None else self.bias.flatten())
        q, k, v = y.chunk(3, dim=-1)
        return q, k, v


class DepthParallelLinear(nn.Module):
    """A column-parallel Linear for each depth, [..., D, in] to [..., D, out/P]; its all-reduce overlaps nothing."""

    weight: nn.Parameter

    def __init__(self, depth: int, in_features: int, out_features: int, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.frozen: list[Product] = []
        """Of each depth, where the weight is frozen."""
        self.tp = tp
        local = cut_size(out_features, tp, "output features")
        self.weight = cut_parameter((depth, local, in_features), 1, tp)
        self.bias = cut_parameter((depth, local), 1, tp)

    def forward(self, x: Tensor, depths: slice = slice(None)) -> Tensor:
        """`depths` are those that x's dimension -2 stands for; all of them by default."""
        if self.frozen:
            forms, biases = self.frozen[depths], self.bias[depths]
            parts = [form(x[..., place, :], biases[place]) for place, form in enumerate(forms)]
            return torch.stack(parts, dim=-2)
        x = copy_to(x, self.tp)
        return torch.einsum("...de,dke->...dk", x, self.weight[depths]) + self.bias[depths]

    def freeze(self, form: Callable[[Tensor], Product], weight: Tensor) -> None:
        """Take this weight, in another form, in the parameter's place."""
        self.frozen = [form(of_depth) for of_depth in weight]
        self.register_parameter("weight", None)


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
