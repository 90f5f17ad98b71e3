"""How tokens are cut over a tensor group; what moves between ranks is in tests/distributed."""

import pytest
import torch

from megarq.parallel.collectives import join_tokens, scatter_tokens, split_tokens
from megarq.parallel.topology import ALONE, TensorGroup

TOKENS = torch.arange(15.0).view(3, 5, 1)


def test_tokens_are_cut_as_one_list_with_zeros_after_the_last():
    parts = [split_tokens(TOKENS, TensorGroup(None, rank, 4, sequence=True)) for rank in range(4)]
    assert torch.cat(parts).flatten().tolist() == [*range(15), 0]
    assert {len(part) for part in parts} == {4}


@pytest.mark.parametrize("tp", [ALONE, TensorGroup(None, 1, 2)], ids=["alone", "tensor"])
def test_tokens_stay_whole_without_sequence_parallelism(tp):
    whole = [split_tokens(TOKENS, tp), join_tokens(TOKENS, tp, 5), scatter_tokens(TOKENS, tp)]
    assert all(x is TOKENS for x in whole)
