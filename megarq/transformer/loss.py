"""The RQ-Transformer's objective: image_weight * image loss + caption_weight * caption loss.

The image loss is cross-entropy against codes (hard) or against Q(k | r_{d-1}) (soft targets, section 3.3 of the paper),
averaged over all positions and depths. The caption loss is cross-entropy of each caption token given those before it.
Shapes: B batch, L condition length, H x W positions, D depth, K codebook size, V caption vocabulary, P tensor-parallel.
"""

from typing import NamedTuple

from torch import Tensor

from megarq.config.run import ObjectiveConfig
from megarq.parallel.cross_entropy import cross_entropy
from megarq.parallel.topology import ALONE, TensorGroup


class LossTerms(NamedTuple):
    """Scalars, fp32; `caption` is None for a model without captions."""

    total: Tensor
    image: Tensor
    caption: Tensor | None


def objective(
    logits: Tensor,
    caption_logits: Tensor | None,
    targets: Tensor,
    cond: Tensor,
    config: ObjectiveConfig,
    pad_id: int | None = None,
    tp: TensorGroup = ALONE,
) -> LossTerms:
    """The loss of a batch; without captions the image loss alone.

    Args:
        logits: [B, H, W, D, K/P].
        caption_logits: [B, L-1, V/P] or None.
        targets: codes int64 [B, H, W, D], or this rank's slice of soft targets [B, H, W, D, K/P].
        cond: int64 [B, L].
        config: weights, and whether [PAD] counts.
        pad_id: the token left out where config.mask_padding.
        tp: the group that the vocabularies are cut over.
    """
    image = cross_entropy(logits, targets, tp).mean()
    if caption_logits is None:
        return LossTerms(image, image, None)
    tokens = cond[:, 1:]
    losses = cross_entropy(caption_logits, tokens, tp)  # [B, L-1]
    if config.mask_padding and pad_id is not None:
        kept = tokens != pad_id
        caption = ((losses * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)).mean()
    else:
        caption = losses.mean()
    return LossTerms(config.image_weight * image + config.caption_weight * caption, image, caption)
