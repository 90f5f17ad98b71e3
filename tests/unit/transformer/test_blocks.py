"""Dropout of a slice of the tokens draws what nn.Dropout draws for all of them."""

import pytest
import torch
from torch import nn

from megarq.parallel.collectives import split_tokens
from megarq.parallel.topology import TensorGroup
from megarq.transformer.blocks import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [2, 4])
def test_slices_are_those_of_nn_dropout(size, dtype):
    whole = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.manual_seed(1)
    expected = nn.Dropout(0.3)(whole)
    for rank in range(size):
        tp = TensorGroup(None, rank, size, sequence=True)
        torch.manual_seed(1)
        slice_ = Dropout(0.3, tp)(split_tokens(whole, tp), 5)
        torch.testing.assert_close(slice_, split_tokens(expected, tp))


def test_dropout_of_all_tokens_is_nn_dropout():
    outputs = []
    for dropout in (Dropout(0.3), nn.Dropout(0.3)):
        torch.manual_seed(1)
        outputs.append(dropout(torch.ones(3, 5, 64)))
    assert torch.equal(*outputs)


def test_nothing_is_dropped_in_evaluation():
    tp = TensorGroup(None, 0, 2, sequence=True)
    assert torch.equal(Dropout(0.3, tp).eval()(torch.ones(8, 64), 5), torch.ones(8, 64))
