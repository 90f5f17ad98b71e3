"""The RQ-Transformer's objective: image_weight * image loss + caption_weight * caption loss.

The image loss is cross-entropy against codes (hard) or against Q(k | r_{d-1}) (soft targets, section 3.3 of the paper),
averaged over all positions and depths. The caption loss is cross-entropy of each caption token given those before it.
Shapes: B batch, L condition length, H x W positions, D depth.
"""

from typing import NamedTuple

from torch import Tensor

from megarq.config.run import ObjectiveConfig


class LossTerms(NamedTuple):
    """Scalars, fp32; `caption` is None for a model without captions."""

    total: Tensor
    image: Tensor
    caption: Tensor | None


def objective(
    image_losses: Tensor,
    caption_losses: Tensor | None,
    cond: Tensor,
    config: ObjectiveConfig,
    pad_id: int | None = None,
    kept: Tensor | None = None,
) -> LossTerms:
    """The loss of a batch; without captions the image loss alone.

    Args:
        image_losses: [B, H, W, D], cross-entropy of each code.
        caption_losses: [B, L-1], cross-entropy of each caption token after the first, or None.
        cond: int64 [B, L].
        config: weights, and whether [PAD] counts.
        pad_id: the token left out where config.mask_padding.
        kept: bool [B], the samples that count; all by default.
    """
    image = _mean(image_losses.flatten(1).mean(dim=1), kept)
    if caption_losses is None:
        return LossTerms(image, image, None)
    if config.mask_padding and pad_id is not None:
        counted = cond[:, 1:] != pad_id
        per_caption = (caption_losses * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)
    else:
        per_caption = caption_losses.mean(dim=1)
    caption = _mean(per_caption, kept)
    return LossTerms(config.image_weight * image + config.caption_weight * caption, image, caption)


def _mean(values: Tensor, kept: Tensor | None) -> Tensor:
    """Mean of [B] over the samples that are kept; 0 where none is."""
    return values.mean() if kept is None else (values * kept).sum() / kept.sum().clamp(min=1)
