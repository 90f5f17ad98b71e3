import pytest
import torch
from torch import Tensor

from megarq.rqvae.codebook import Codebook, Span, full_precision

DIM = 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(size: int = 8, restart: bool = True, seed: int = 0) -> Codebook:
    return Codebook(size, DIM, restart_unused=restart, generator=seeded(seed))


def vectors(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, DIM, generator=seeded(seed))


def nearest_distances(points: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Of each point, the exact distance to its nearest latent and that latent's index."""
    nearest = (points.unsqueeze(1) - latents).square().sum(-1).sqrt().min(1)
    return nearest.values, nearest.indices


def update(book: Codebook, latents: Tensor, codes: Tensor, seed: int = 2) -> None:
    book.update(latents, codes, Span(0, len(latents)), seeded(seed))


def test_nearest_is_the_smallest_distance_computed_directly() -> None:
    book, latents = make(), vectors(50)
    direct = (latents.unsqueeze(1) - book.weight[:-1]).square().sum(-1).argmin(1)
    assert torch.equal(book.nearest(latents), direct)


def test_padding_row_is_never_returned() -> None:
    book, latents = make(), vectors(50)
    book.weight[:-1] += 100
    book.weight[-1] = latents.mean(0)
    assert book.nearest(latents).max() < book.size


def test_update_is_the_moving_average_formula() -> None:
    book, latents = make(restart=False), vectors(40)
    book.cluster_size_ema.uniform_(1, 5, generator=seeded())
    book.embed_ema.normal_(generator=seeded())
    codes = torch.arange(40) % 5  # codes 5 to 7 are not used
    counts, sums = book.cluster_size_ema.clone(), book.embed_ema.clone()
    update(book, latents, codes)
    expected = torch.zeros(8, DIM)
    for k in range(8):
        counts[k] = 0.99 * counts[k] + 0.01 * (codes == k).sum()
        sums[k] = 0.99 * sums[k] + 0.01 * latents[codes == k].sum(0)
    for k in range(8):
        expected[k] = sums[k] / ((counts[k] + 1e-5) / (counts.sum() + 8 * 1e-5) * counts.sum())
    torch.testing.assert_close(book.cluster_size_ema, counts)
    torch.testing.assert_close(book.weight[:-1], expected)


def test_update_leaves_the_padding_row() -> None:
    book = make()
    update(book, vectors(40), torch.arange(40) % 5)
    assert torch.equal(book.weight[-1], torch.zeros(DIM))


def test_unused_codes_restart_from_different_latents_of_the_batch() -> None:
    book, latents = make(), vectors(40)
    book.cluster_size_ema.fill_(1.0)
    update(book, latents, torch.zeros(40, dtype=torch.int64))  # code 0 is used, 1 to 7 are not
    restarted = book.embed_ema[1:]
    distances, sources = nearest_distances(restarted, latents)
    assert torch.equal(distances, torch.zeros(7))
    assert len(sources.unique()) == 7
    torch.testing.assert_close(book.weight[1:-1], restarted, rtol=1e-4, atol=1e-5)


def test_used_codes_do_not_restart() -> None:
    book, latents = make(size=2), vectors(40)
    book.cluster_size_ema.fill_(1.0)
    book.embed_ema.fill_(3.0)
    update(book, latents, torch.tensor([0] + [1] * 39))  # code 0 once: its moving count stays exactly 1
    torch.testing.assert_close(book.embed_ema[0], 0.99 * torch.full((DIM,), 3.0) + 0.01 * latents[0])


def test_fewer_latents_than_codes_are_repeated_with_noise() -> None:
    book, latents = make(size=8), vectors(3)
    update(book, latents, torch.zeros(3, dtype=torch.int64))
    distances, _ = nearest_distances(book.embed_ema, latents)
    assert len(book.embed_ema.unique(dim=0)) == 8
    assert (distances == 0).sum() == 3
    assert distances.max() < 0.1


def test_restarts_depend_on_the_generator_alone() -> None:
    books = [make(seed=seed) for seed in (0, 5)]
    for book in books:
        torch.manual_seed(book.weight[0, 0].abs().mul(1e6).int().item())  # the global generator must not matter
        update(book, vectors(5), torch.zeros(5, dtype=torch.int64), seed=2)
    assert torch.equal(books[0].embed_ema, books[1].embed_ema)


def test_unused_codes_stay_without_restarts() -> None:
    book = make(restart=False)
    before = book.weight[1:-1].clone()
    update(book, vectors(40), torch.zeros(40, dtype=torch.int64))
    torch.testing.assert_close(book.weight[1:-1], before, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_buffers_keep_their_fp32_values_when_cast(dtype: torch.dtype) -> None:
    book = make()
    before = {name: tensor.clone() for name, tensor in book.state_dict().items()}
    book.to(dtype)
    for name, tensor in book.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name]), name


def test_buffers_follow_the_device() -> None:
    assert {tensor.device.type for tensor in make().to("meta").buffers()} == {"meta"}


def test_full_precision_turns_autocast_off() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), full_precision("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_full_precision_turns_tf32_off_and_on_again() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with full_precision("cpu"):
            inside = matmul.fp32_precision
        after = matmul.fp32_precision
    finally:
        matmul.fp32_precision = before
    assert (inside, after) == ("ieee", "tf32")
