"""The objective's weights, and what [PAD] does to the caption loss."""

import pytest
import torch
import torch.nn.functional as F

from megarq.config.run import ObjectiveConfig
from megarq.parallel.cross_entropy import cross_entropy
from megarq.transformer.loss import objective

PAD = 0
LOGITS = torch.randn(2, 2, 2, 3, 7, generator=torch.Generator().manual_seed(0))
CODES = torch.randint(7, (2, 2, 2, 3), generator=torch.Generator().manual_seed(1))
CAPTION_LOGITS = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(2))
COND = torch.tensor([[4, 8, 3, 5], [6, 7, PAD, PAD]])
IMAGE, CAPTION = cross_entropy(LOGITS, CODES), cross_entropy(CAPTION_LOGITS, COND[:, 1:])


def caption_losses() -> torch.Tensor:
    """[2, 3]: each token after the first, given those before it."""
    return F.cross_entropy(CAPTION_LOGITS.flatten(0, 1), COND[:, 1:].flatten(), reduction="none").view(2, 3)


def test_the_image_loss_is_the_mean_over_positions_and_depths():
    terms = objective(IMAGE, None, COND, ObjectiveConfig())
    torch.testing.assert_close(terms.image, F.cross_entropy(LOGITS.flatten(0, 3), CODES.flatten()))


def test_without_captions_the_total_is_the_image_loss():
    terms = objective(IMAGE, None, COND, ObjectiveConfig(image_weight=0.3))
    assert terms.caption is None and torch.equal(terms.total, terms.image)


@pytest.mark.parametrize(("image", "caption"), [(0.9, 0.1), (0.5, 2.0)])
def test_the_total_is_the_weighted_sum(image, caption):
    terms = objective(IMAGE, CAPTION, COND, ObjectiveConfig(image_weight=image, caption_weight=caption), PAD)
    torch.testing.assert_close(terms.total, image * terms.image + caption * terms.caption)


def test_the_caption_loss_averages_over_padding():
    terms = objective(IMAGE, CAPTION, COND, ObjectiveConfig(), PAD)
    torch.testing.assert_close(terms.caption, caption_losses().mean())


def test_masked_padding_is_left_out_of_each_caption():
    terms = objective(IMAGE, CAPTION, COND, ObjectiveConfig(mask_padding=True), PAD)
    losses = caption_losses()
    torch.testing.assert_close(terms.caption, (losses[0].mean() + losses[1, 0]) / 2)


def test_a_caption_of_padding_alone_costs_nothing():
    cond = torch.full((2, 4), PAD)
    terms = objective(IMAGE, cross_entropy(CAPTION_LOGITS, cond[:, 1:]), cond, ObjectiveConfig(mask_padding=True), PAD)
    assert terms.caption == 0


def test_samples_that_are_not_kept_do_not_count():
    kept = torch.tensor([True, False])
    terms = objective(IMAGE, CAPTION, COND, ObjectiveConfig(), PAD, kept)
    torch.testing.assert_close(terms, objective(IMAGE[:1], CAPTION[:1], COND[:1], ObjectiveConfig(), PAD))
