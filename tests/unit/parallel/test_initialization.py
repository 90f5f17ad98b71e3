"""Weights as a function of seed and name."""

import torch

from megarq.parallel.initialization import derived_seed, fill_normal, named_generator
from megarq.parallel.layers import cut_parameter
from megarq.parallel.topology import ALONE, TensorGroup


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


def test_filling_is_independent_of_the_global_generator():
    first, second = torch.empty(3, 4), torch.empty(3, 4)
    torch.manual_seed(0)
    fill_normal(first, 0.02, 5, "w", ALONE)
    torch.manual_seed(1)
    fill_normal(second, 0.02, 5, "w", ALONE)
    assert torch.equal(first, second)


def test_filled_weights_have_the_deviation_asked_for():
    weight = torch.empty(200, 200)
    fill_normal(weight, 0.02, 5, "w", ALONE)
    assert abs(weight.std() - 0.02) < 2e-4 and abs(weight.mean()) < 4e-4


def test_slices_of_a_cut_weight_are_parts_of_the_whole():
    whole = torch.empty(6, 8)
    fill_normal(whole, 1.0, 5, "w", ALONE)
    parts = []
    for rank in range(2):
        tp = TensorGroup(None, rank, 2)
        part = cut_parameter((6, 4), 1, tp)
        fill_normal(part, 1.0, 5, "w", tp)
        parts.append(part)
    assert torch.equal(torch.cat(parts, dim=1), whole)
