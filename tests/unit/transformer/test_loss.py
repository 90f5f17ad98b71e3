"""The objective's weights, and what [PAD] does to the caption loss."""

import pytest
import torch
import torch.nn.functional as F

from megarq.config.run import ObjectiveConfig
from megarq.transformer.loss import objective

PAD = 0
LOGITS = torch.randn(2, 2, 2, 3, 7, generator=torch.Generator().manual_seed(0))
CODES = torch.randint(7, (2, 2, 2, 3), generator=torch.Generator().manual_seed(1))
CAPTION_LOGITS = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(2))
COND = torch.tensor([[4, 8, 3, 5], [6, 7, PAD, PAD]])


def caption_losses() -> torch.Tensor:
    """[2, 3]: each token after the first, given those before it."""
    return F.cross_entropy(CAPTION_LOGITS.flatten(0, 1), COND[:, 1:].flatten(), reduction="none").view(2, 3)


def test_the_image_loss_is_the_mean_over_positions_and_depths():
    terms = objective(LOGITS, None, CODES, COND, ObjectiveConfig())
    torch.testing.assert_close(terms.image, F.cross_entropy(LOGITS.flatten(0, 3), CODES.flatten()))


def test_without_captions_the_total_is_the_image_loss():
    terms = objective(LOGITS, None, CODES, COND, ObjectiveConfig(image_weight=0.3))
    assert terms.caption is None and torch.equal(terms.total, terms.image)


@pytest.mark.parametrize(("image", "caption"), [(0.9, 0.1), (0.5, 2.0)])
def test_the_total_is_the_weighted_sum(image, caption):
    terms = objective(
        LOGITS, CAPTION_LOGITS, CODES, COND, ObjectiveConfig(image_weight=image, caption_weight=caption), PAD
    )
    torch.testing.assert_close(terms.total, image * terms.image + caption * terms.caption)


def test_the_caption_loss_averages_over_padding():
    terms = objective(LOGITS, CAPTION_LOGITS, CODES, COND, ObjectiveConfig(), PAD)
    torch.testing.assert_close(terms.caption, caption_losses().mean())


def test_masked_padding_is_left_out_of_each_caption():
    terms = objective(LOGITS, CAPTION_LOGITS, CODES, COND, ObjectiveConfig(mask_padding=True), PAD)
    losses = caption_losses()
    torch.testing.assert_close(terms.caption, (losses[0].mean() + losses[1, 0]) / 2)


def test_a_caption_of_padding_alone_costs_nothing():
    cond = torch.full((2, 4), PAD)
    terms = objective(LOGITS, CAPTION_LOGITS, CODES, cond, ObjectiveConfig(mask_padding=True), PAD)
    assert terms.caption == 0


def test_soft_targets_are_cross_entropy_against_them():
    soft = torch.randn(LOGITS.shape, generator=torch.Generator().manual_seed(5)).softmax(-1)
    terms = objective(LOGITS, None, soft, COND, ObjectiveConfig())
    torch.testing.assert_close(terms.image, -(soft * LOGITS.log_softmax(-1)).sum(-1).mean())
