"""What cut layers refuse, how they mark their parameters and what they keep; mathematics is in tests/distributed."""

import pytest
import torch
from torch import Tensor

from megarq.errors import ConfigError
from megarq.parallel.layers import (
    ColumnParallelLinear,
    DepthParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megarq.parallel.topology import TensorGroup

HALF = TensorGroup(None, 1, 2)
LAYERS = {
    "column": (lambda size, tp: ColumnParallelLinear(4, size, tp=tp), {"weight": 0, "bias": 0}),
    "row": (lambda size, tp: RowParallelLinear(size, 4, tp=tp), {"weight": 1}),
    "qkv": (lambda size, tp: QKVParallelLinear(size, tp=tp), {"weight": 1, "bias": 1}),
    "depth": (lambda size, tp: DepthParallelLinear(3, 4, size, tp), {"weight": 1, "bias": 1}),
    "embedding": (lambda size, tp: VocabParallelEmbedding(size, 4, tp), {"weight": 0}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_size_that_tp_does_not_divide_is_refused(name):
    with pytest.raises(ConfigError, match="=7 is not divisible by parallel.tp=2. Choose a tp that divides it."):
        LAYERS[name][0](7, HALF)


@pytest.mark.parametrize("name", LAYERS)
def test_cut_parameters_are_marked_for_norms_and_checkpoints(name):
    build, dims = LAYERS[name]
    layer = build(8, HALF)
    marked = {name: p.partition_dim for name, p in layer.named_parameters() if hasattr(p, "partition_dim")}
    assert marked == dims
    assert all(layer.get_parameter(name).model_parallel for name in dims)
    assert all(layer.get_parameter(name).tensor_model_parallel for name in dims)


@pytest.mark.parametrize("name", LAYERS)
def test_a_rank_holds_its_share_alone(name):
    build, dims = LAYERS[name]
    cut, whole = build(8, HALF), build(8, TensorGroup())
    for parameter, dim in dims.items():
        assert cut.get_parameter(parameter).shape[dim] * 2 == whole.get_parameter(parameter).shape[dim]


@pytest.mark.parametrize("name", LAYERS)
def test_uncut_parameters_are_not_marked(name):
    assert not any(hasattr(p, "model_parallel") for p in LAYERS[name][0](8, TensorGroup()).parameters())


@pytest.mark.parametrize(
    ("name", "tp"), [("qkv", TensorGroup()), ("qkv", HALF), ("column", HALF)], ids=["qkv", "cut qkv", "cut column"]
)
def test_nothing_but_the_parameter_itself_holds_its_memory(name, tp):
    """A view kept for the backward pass would hold the weight that ZeRO-3 gathers for the forward pass alone."""
    layer = LAYERS[name][0](4, tp)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        layer(torch.ones(2, 4, requires_grad=True))
    memory = layer.weight.untyped_storage().data_ptr()
    assert [saved is layer.weight for saved in kept if saved.untyped_storage().data_ptr() == memory] == [True]


def test_the_backward_pass_reads_the_weight_that_the_parameter_then_holds():
    """ZeRO-3 frees the parameter's data after the forward pass and gathers them anew."""
    layer = QKVParallelLinear(4)
    values = torch.arange(48.0).view(3, 4, 4)
    layer.weight.data, layer.bias.data = torch.zeros(3, 4, 4), torch.zeros(3, 4)
    x = torch.ones(2, 4, requires_grad=True)
    q, k, v = layer(x)
    layer.weight.data = torch.empty(0)
    layer.weight.data = values
    (q + k + v).sum().backward()
    assert torch.equal(x.grad, values.sum(dim=(0, 1)).expand(2, 4))
    assert torch.equal(layer.weight.grad, torch.full((3, 4, 4), 2.0))
