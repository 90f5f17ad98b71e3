"""Stochastic codes and their Q, made by a tensor group of which each rank sees its slice of the codebook alone."""

import pytest
import torch
from cut_layers import SIZES, own, tensor_group
from torch import Tensor

from megarq.rqvae.quantizer import ResidualQuantizer

DIM, BATCH = 8, 50
CODEBOOKS = {"shared": ((64, 64, 64), True), "of their own size": ((8, 64, 37), False)}


def prepared(sizes: tuple[int, ...], shared: bool) -> tuple[ResidualQuantizer, Tensor, list[torch.Generator]]:
    """A quantizer, latents [B, 2, 2, C], and a generator for each; the same on every rank."""
    quantizer = ResidualQuantizer(sizes, DIM, shared=shared).eval()
    for index, book in enumerate(quantizer.codebooks):
        book.weight.copy_(torch.randn(book.weight.shape, generator=torch.Generator().manual_seed(index)))
    latents = torch.randn(BATCH, 2, 2, DIM, generator=torch.Generator().manual_seed(9))
    return quantizer, latents, [torch.Generator().manual_seed(100 + sample) for sample in range(BATCH)]


def check_draws(sizes: tuple[int, ...], shared: bool, temperature: float) -> None:
    tp = tensor_group()
    quantizer, latents, generators = prepared(sizes, shared)
    expected_codes, expected_soft = quantizer.draw_codes(latents, temperature, generators)
    _, _, generators = prepared(sizes, shared)
    codes, soft = quantizer.draw_codes(latents, temperature, generators, tp)
    assert torch.equal(codes, expected_codes)
    torch.testing.assert_close(soft, own(expected_soft))
    _, _, generators = prepared(sizes, shared)
    assert torch.equal(quantizer.draw_hard_codes(latents, temperature, generators, tp), expected_codes)


def codes_looked_at() -> list[int]:
    """How many codes each search of this rank compares its residuals with."""
    quantizer, latents, generators = prepared(*CODEBOOKS["of their own size"])
    widths: list[int] = []
    for book in quantizer.codebooks:
        search = book.distances
        book.distances = lambda vectors, some, search=search: (
            widths.append((found := search(vectors, some)).shape[-1]),
            found,
        )[1]
    quantizer.draw_codes(latents, 1.0, generators, tensor_group())
    return widths


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [0.01, 4.0, 1e6], ids=lambda value: f"temperature {value}")
@pytest.mark.parametrize("codebooks", CODEBOOKS)
def test_codes_are_those_of_one_rank_and_q_is_its_slice(rank_group, codebooks, temperature, size):
    rank_group(size).run(check_draws, *CODEBOOKS[codebooks], temperature)


def test_each_rank_searches_its_slice_alone(rank_group):
    assert rank_group(4).run(codes_looked_at) == [[8, 16, 16], [0, 16, 16], [0, 16, 5], [0, 16, 0]]
