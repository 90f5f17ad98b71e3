"""Weights as a function of seed and name."""

import torch

from megarq.parallel.initialization import derived_seed, named_generator, normal_values
from megarq.parallel.topology import TensorGroup


def test_derived_seeds_are_the_same_in_every_release():
    assert derived_seed(0, "body.0.mlp.up.weight") == 7253194722511913975


def test_derived_seeds_differ_by_seed_and_by_name():
    seeds = {derived_seed(seed, *names) for seed in range(3) for names in (("a", "b"), ("a",), ("b", "a"), (1, 0))}
    assert len(seeds) == 12


def test_derived_seeds_suit_torch():
    for number in range(50):
        assert 0 <= derived_seed(number, "x") < 2**63
        torch.manual_seed(derived_seed(number, "x"))


def test_generators_of_one_name_draw_the_same():
    draws = [torch.randn(4, generator=named_generator(1, "draw", 7)) for _ in range(2)]
    assert torch.equal(*draws)


def test_values_are_independent_of_the_global_generator():
    values = []
    for seed in range(2):
        torch.manual_seed(seed)
        values.append(normal_values((3, 4), 0.02, 5, "w"))
    assert torch.equal(*values)


def test_values_have_the_deviation_asked_for():
    weight = normal_values((200, 200), 0.02, 5, "w")
    assert abs(weight.std() - 0.02) < 2e-4 and abs(weight.mean()) < 4e-4


def test_slices_of_a_cut_weight_are_parts_of_the_whole():
    whole = normal_values((6, 8), 1.0, 5, "w")
    parts = [normal_values((6, 4), 1.0, 5, "w", TensorGroup(None, rank, 2), 1) for rank in range(2)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
