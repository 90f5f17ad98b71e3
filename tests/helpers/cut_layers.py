"""Layers cut over all ranks of a group beside the uncut ones: each rank holds both and compares its slice.

B sequences, S tokens of each, n tokens of a rank under sequence parallelism, E width, P ranks.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import get_rank, get_world_size

from megarq.parallel.initialization import normal_values
from megarq.parallel.topology import ALONE, ProcessGroups, TensorGroup, Topology

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
SIZES = [2, 4]


@cache
def tensor_group(sequence: bool = False) -> TensorGroup:
    """All ranks as one tensor group."""
    topology = Topology(get_world_size(), get_rank(), tp=get_world_size())
    return ProcessGroups.build(topology, sequence).tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    """The same numbers on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def own(whole: Tensor, dim: int = -1) -> Tensor:
    """This rank's slice."""
    return whole.chunk(get_world_size(), dim)[get_rank()]


def own_tokens(whole: Tensor) -> Tensor:
    """This rank's rows [n, E] of all tokens [B, S, E], zeros after the last."""
    size, rank = get_world_size(), get_rank()
    rows = list(whole.flatten(0, 1))
    n = -(-len(rows) // size)
    rows += [torch.zeros_like(rows[0])] * (n * size - len(rows))
    return torch.stack(rows[rank * n : (rank + 1) * n])


def uncut(whole: Tensor) -> Tensor:
    """All of it."""
    return whole


def check(actual: Tensor | None, expected: Tensor | None, what: str = "") -> None:
    """Equal within fp32's rounding."""
    assert actual is not None and expected is not None, what
    torch.testing.assert_close(actual, expected, **CLOSE, msg=lambda message: f"{what}: {message}")


def filled(layer: nn.Module, tp: TensorGroup) -> nn.Module:
    """Every parameter drawn, biases too, as `initialize` does."""
    for name, parameter in layer.named_parameters():
        dim = getattr(parameter, "partition_dim", None)
        parameter.data.copy_(normal_values(parameter.shape, 0.5, 1, name, tp, dim))
    return layer


def check_layer(
    cut: nn.Module,
    whole: nn.Module,
    x: Tensor,
    cut_input: Callable[[Tensor], Tensor] = uncut,
    cut_output: Callable[[Tensor], Tensor] = own,
    tokens: int = 0,
) -> None:
    """Outputs and all gradients of a layer; `cut_input` and `cut_output` say what a rank has of the uncut ones."""
    filled(cut, tensor_group()), filled(whole, ALONE)
    our_input = cut_input(x).clone().requires_grad_()
    their_input = x.clone().requires_grad_()
    answers = cut(our_input, tokens) if tokens else cut(our_input), whole(their_input)
    ours, theirs = (y if isinstance(y, tuple) else (y,) for y in answers)
    weights = [normal(*y.shape, seed=5 + index) for index, y in enumerate(theirs)]
    for index, (y, expected) in enumerate(zip(ours, theirs, strict=True)):
        expected = cut_output(expected)
        kept = cut_output(torch.ones_like(theirs[index]))  # what a layer answers for padding is nobody's business
        check(y * kept, expected * kept, f"output {index}")
    sum((y * cut_output(w)).sum() for y, w in zip(ours, weights, strict=True)).backward()
    sum((y * w).sum() for y, w in zip(theirs, weights, strict=True)).backward()
    check(our_input.grad, cut_input(their_input.grad), "input's gradient")
    check_gradients(cut, whole)


def check_gradients(cut: nn.Module, whole: nn.Module) -> None:
    """Each parameter's gradient is the uncut one's slice, and no more than that is held."""
    wholes = dict(whole.named_parameters())
    for name, parameter in cut.named_parameters():
        expected = wholes.pop(name).grad
        dim = getattr(parameter, "partition_dim", None)
        check(parameter.grad, expected if dim is None else own(expected, dim), f"gradient of {name}")
    assert not wholes


class SplitQKV(nn.Module):
    """torch's Linear with QKVParallelLinear's parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(3, width, width)), nn.Parameter(torch.empty(3, width))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.linear(x, self.weight[index], self.bias[index]) for index in range(3))
