"""What cut layers refuse and how they mark their parameters; their mathematics is in tests/distributed."""

import pytest

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
