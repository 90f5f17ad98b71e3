"""The helper itself: a rank that fails is heard, and does not take the next case with it."""

import os

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import RankError


def sum_of_ranks(offset: int) -> float:
    value = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(value)
    return value.item()


def raise_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("the reason")
    sum_of_ranks(0)


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    sum_of_ranks(0)


def test_every_rank_answers(rank_group):
    assert rank_group(2).run(sum_of_ranks, 10) == [21.0, 21.0]


def test_a_failing_rank_is_heard_while_its_peer_waits_for_it(rank_group):
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 raised.*raise_on_rank_one.*the reason"):
        rank_group(2).run(raise_on_rank_one)
    assert rank_group(2).run(sum_of_ranks, 0) == [1.0, 1.0]


def test_a_dead_rank_is_heard(rank_group):
    with pytest.raises(RankError, match=r"rank 1 died with exit code 7|rank 0 of 2 raised"):
        rank_group(2).run(die_on_rank_one)
