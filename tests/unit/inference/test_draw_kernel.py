"""The Triton kernel in Triton's interpreter, held against the draw in PyTorch; tests/gpu runs it compiled."""

import pytest
import torch
from interpreted_kernels import interpreted_draw

from megarq.inference.settings import DepthSettings

SETTINGS = [(10**6, 1.0, 1.0), (3, 1.0, 1.0), (10**6, 0.6, 0.7), (40, 0.9, 1.3), (2, 0.5, 0.1), (10**6, 1e-9, 1.0)]


@pytest.fixture(scope="module")
def draw():
    with interpreted_draw() as draw:
        yield draw


@pytest.mark.parametrize("classes", [1, 3, 100, 4099])
@pytest.mark.parametrize(("top_k", "top_p", "temperature"), SETTINGS)
def test_the_kernel_draws_what_pytorch_draws(draw, classes, top_k, top_p, temperature):
    generator = torch.Generator().manual_seed(classes)
    logits = (
        torch.stack([torch.randperm(classes, generator=generator) for _ in range(48)]) / classes * 12
    )  # no two equal
    uniform = torch.rand(len(logits), generator=generator, dtype=torch.float64)
    settings = DepthSettings(min(top_k, classes), top_p, temperature)
    assert torch.equal(draw(logits, uniform, settings.top_k, top_p, temperature), settings.draw(logits, uniform))


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(2, 1.0, {0, 1}), (3, 1.0, {0, 1, 2}), (4, 0.6, {0, 1, 2}), (4, 0.5, {0, 1}), (3, 0.6, {0, 1})],
)
def test_of_equal_codes_the_first_ones_are_kept(draw, top_k, top_p, kept):
    uniform = torch.arange(100, dtype=torch.float64) / 100
    assert set(draw(torch.zeros(100, 4), uniform, top_k, top_p, 1.0).tolist()) == kept


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_no_code_of_probability_zero_is_drawn_at_the_ends_of_the_range(draw, top_p):
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(2, -1)
    assert draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 5, top_p, 1.0).tolist() == [1, 3]


def test_logits_that_are_not_finite_give_a_code_all_the_same(draw):
    logits = torch.full((2, 6), float("nan"))
    assert 0 <= int(draw(logits, torch.rand(2, dtype=torch.float64), 3, 0.9, 1.0).max()) < 6
