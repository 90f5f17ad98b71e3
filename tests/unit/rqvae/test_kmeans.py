"""Codebooks that start as residual k-means; what several ranks make of it is in tests/distributed."""

import pytest
import torch
from torch import Tensor

from megarq.rqvae.kmeans import gather_sample, start_codebooks
from megarq.rqvae.quantizer import ResidualQuantizer

DIM = 6
LAYOUTS = {"shared": ((24, 24, 24), True), "per depth": ((12, 8, 4), False)}


def quantizer(layout: str = "shared", seed: int = 0) -> ResidualQuantizer:
    sizes, shared = LAYOUTS[layout]
    return ResidualQuantizer(sizes, DIM, shared=shared, seed=seed)


def clusters(count: int = 12, each: int = 40, spread: float = 0.05, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Centres [count, C], and `each` vectors around each of them."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(count, DIM, generator=generator)
    points = centres.repeat_interleave(each, 0) + spread * torch.randn(count * each, DIM, generator=generator)
    return centres, points


def error(model: ResidualQuantizer, vectors: Tensor) -> float:
    """Mean squared distance of vectors to the sum of their codes."""
    latents = vectors.reshape(-1, 1, 1, DIM)
    return float((latents - model.embed(model.quantize(latents)).sum(-2)).square().mean())


def test_one_depth_finds_the_clusters():
    centres, points = clusters(each=100)
    model = ResidualQuantizer((48,), DIM)
    start_codebooks(model, points, 20, len(points))
    distances = torch.cdist(centres, model.codebook(0).vectors).min(1).values
    assert distances.max() < 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_iterations_bring_the_codes_nearer(layout):
    _, points = clusters(spread=0.5)
    errors = []
    for iterations in (0, 1, 15):
        model = quantizer(layout)
        start_codebooks(model, points, iterations, len(points))
        errors.append(error(model, points))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_start_is_far_better_than_a_random_codebook(layout):
    _, points = clusters(spread=0.5)
    model = quantizer(layout)
    before = error(model, points)
    start_codebooks(model, points, 10, len(points))
    assert error(model, points) < before / 5


def test_depths_of_a_shared_codebook_all_find_codes():
    _, points = clusters(spread=0.5)
    model = quantizer()
    start_codebooks(model, points, 10, len(points))
    codes = model.quantize(points.reshape(-1, 1, 1, DIM))
    assert min(len(codes[..., depth].unique()) for depth in range(model.depth)) > 6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_start_depends_on_the_seed_alone(layout):
    _, points = clusters(spread=0.5)
    starts = []
    for seed, disturbance in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(disturbance)
        model = quantizer(layout, seed)
        start_codebooks(model, points, 3, len(points))
        starts.append(torch.cat([buffer.flatten() for buffer in model.buffers()]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_codes_that_no_latent_chooses_are_drawn_anew():
    _, points = clusters(count=2, each=50, spread=0.3)
    points[:40] = points[0]  # many codes start as the same vector, and all but one of them are empty
    model = ResidualQuantizer((32,), DIM)
    start_codebooks(model, points, 10, len(points))
    used = model.quantize(points.reshape(-1, 1, 1, DIM)).unique()
    assert len(used) > 25


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_moving_averages_are_those_of_the_codes(layout):
    _, points = clusters(spread=0.5)
    model = quantizer(layout)
    start_codebooks(model, points, 5, 8 * len(points))
    codes = model.quantize(points.reshape(-1, 1, 1, DIM))
    for index in range(len(model.codebooks)):
        book = model.codebook(index)
        mine = codes if model.shared else codes[..., index]
        counts = torch.bincount(mine.flatten(), minlength=book.size) * 8 / (model.depth if model.shared else 1)
        torch.testing.assert_close(book.cluster_size_ema, counts.clamp(min=2.0))
        torch.testing.assert_close(book.embed_ema, book.weight[:-1] * book.cluster_size_ema.unsqueeze(1))


def test_the_padding_row_stays():
    _, points = clusters()
    model = quantizer()
    start_codebooks(model, points, 2, len(points))
    assert torch.equal(model.codebook(0).weight[-1], torch.zeros(DIM))


def test_the_first_training_step_keeps_the_start():
    _, points = clusters(spread=0.5)
    model = quantizer()
    start_codebooks(model, points, 10, len(points))
    start = model.codebook(0).vectors.clone()
    model.train()(points.reshape(-1, 1, 1, DIM))
    moved = (model.codebook(0).vectors - start).norm(dim=1)
    assert moved.max() < 0.2 * start.norm(dim=1).mean()


def test_a_sample_is_of_all_batches_without_repetition():
    batches = [torch.arange(12.0).reshape(3, 2, 2, 1) + 100 * number for number in range(4)]
    sample = gather_sample(batches, 30, 0, None)
    everything = torch.cat([batch.flatten() for batch in batches])
    assert sample.shape == (30, 1) and len(sample.unique()) == 30
    assert torch.isin(sample.flatten(), everything).all()
    assert len((sample // 100).unique()) == 4


def test_a_small_sample_is_all_that_there_is():
    batches = [torch.arange(12.0).reshape(3, 2, 2, 1)]
    assert sorted(gather_sample(batches, 100, 0, None).flatten().tolist()) == list(range(12))
