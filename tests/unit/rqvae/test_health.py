"""Counts of codes, and the usage, perplexity and dead codes that they tell of."""

import math

import pytest
import torch

from megarq.rqvae.health import CodeCounts, use_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("counts", "usage", "perplexity", "dead"),
    [
        ([3, 3, 3, 3], 1.0, 4.0, 0),
        ([7, 0, 0, 0], 0.25, 1.0, 3),
        ([5, 5, 0, 0], 0.5, 2.0, 2),
        ([2, 1, 1, 0], 0.75, math.exp(1.5 * math.log(2)), 1),
        ([0, 0, 0, 0], 0.0, 1.0, 4),
    ],
)
def test_the_use_of_a_codebook(counts, usage, perplexity, dead):
    use = use_of(torch.tensor(counts))
    assert use.usage == usage and use.dead == dead
    assert use.perplexity == pytest.approx(perplexity)


def random_codes(seed: int, sizes: tuple[int, ...], batch: int = 3) -> torch.Tensor:
    """[batch, 2, 2, D], each depth's codes within its size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(size, (batch, 2, 2), generator=generator) for size in sizes], dim=-1)


@pytest.mark.parametrize("sizes", [(6, 6, 6), (9, 4, 2)])
def test_counts_are_those_of_each_depth_over_all_batches(sizes):
    batches = [random_codes(seed, sizes, batch=seed + 1) for seed in range(3)]
    counts = CodeCounts(sizes, CPU)
    for codes in batches:
        counts.add(codes)
    for depth, counted in enumerate(counts.take()):
        chosen = torch.cat([codes[..., depth].flatten() for codes in batches])
        assert torch.equal(counted, torch.bincount(chosen, minlength=sizes[depth]))


def test_counting_starts_again_after_a_window():
    counts = CodeCounts((5, 5), CPU)
    counts.add(torch.tensor([[0, 4]]))
    first = counts.take()
    counts.add(torch.tensor([[1, 4]]))
    second = counts.take()
    assert [each.tolist() for each in first] == [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert [each.tolist() for each in second] == [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]
