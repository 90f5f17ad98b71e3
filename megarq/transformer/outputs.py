"""From the last hidden states to logits over codes and over caption tokens, or to the loss of each.

Shapes: B batch, L condition length, H x W = T positions, D depth, E width, K largest codebook, V caption vocabulary,
P tensor-parallel size: each rank gives its slice of the vocabularies.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megarq.config.models import RQTransformerConfig
from megarq.parallel.cross_entropy import cross_entropy
from megarq.parallel.layers import ColumnParallelLinear, DepthParallelLinear
from megarq.parallel.norms import LayerNorm
from megarq.parallel.topology import ALONE, TensorGroup

MASKED_LOGIT = -1e6
"""Logit of a code that a depth's codebook does not have; finite, so that a zero target keeps a zero loss."""
LOGITS_AT_ONCE = 2**25
"""Logits that the loss computes at a time: 2,048 tokens over 16,384 codes."""


class CodeClassifier(nn.Module):
    """LayerNorm and Linear to the codes, shared by all depths or one for each."""

    absent: Tensor | None

    def __init__(self, config: RQTransformerConfig, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        largest = max(config.sizes)
        self.classes = largest // tp.size
        self.norm = LayerNorm(config.embed_dim)
        self.linear: ColumnParallelLinear | DepthParallelLinear
        if config.shared_classifier:
            self.linear = ColumnParallelLinear(config.embed_dim, largest, tp=tp)
        else:
            self.linear = DepthParallelLinear(config.depth, config.embed_dim, largest, tp)
        self.register_buffer("absent", None, persistent=False)
        if len(set(config.sizes)) > 1:
            absent = torch.arange(largest) >= torch.tensor(config.sizes).unsqueeze(1)  # [D, K]
            self.absent = absent.chunk(tp.size, -1)[tp.rank]

    def forward(self, hidden: Tensor, depths: slice = slice(None)) -> Tensor:
        """[..., D, E] to [..., D, K/P]; `depths` are those that dimension -2 stands for."""
        hidden = self.norm(hidden)
        per_depth = isinstance(self.linear, DepthParallelLinear)
        logits = self.linear(hidden, depths) if per_depth else self.linear(hidden)
        if self.absent is None:
            return logits
        return logits.masked_fill(self.absent[depths], max(MASKED_LOGIT, torch.finfo(logits.dtype).min))


class CaptionClassifier(nn.Module):
    """LayerNorm and Linear to the caption's next token: [B, L-1, E] to [B, L-1, V/P]."""

    def __init__(self, config: RQTransformerConfig, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.classes = config.cond_vocab_size // tp.size
        self.norm = LayerNorm(config.embed_dim)
        self.linear = ColumnParallelLinear(config.embed_dim, config.cond_vocab_size, tp=tp)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(self.norm(hidden))


class Outputs(nn.Module):
    """Both classifiers, and the losses, which need no whole logits: what a pipeline's last stage ends with."""

    def __init__(
        self, config: RQTransformerConfig, tp: TensorGroup = ALONE, logits_at_once: int = LOGITS_AT_ONCE
    ) -> None:
        """`logits_at_once` bounds the numbers of logits that `losses` holds at a time."""
        super().__init__()
        self.tp = tp
        self.shape = tuple(config.code_shape)
        self.logits_at_once = logits_at_once
        self.codes = CodeClassifier(config, tp)
        self.caption = CaptionClassifier(config, tp) if config.condition == "text" else None

    def forward(
        self, head: Tensor, caption: Tensor | None = None, targets: Tensor | None = None, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, or with targets the loss of each token.

        Args:
            head: [B*T, D, E].
            caption: [B, L-1, E]; None where the model has no captions.
            targets: codes int64 [B, H, W, D], or this rank's slice of soft targets [B, H, W, D, K/P].
            cond: int64 [B, L], given with targets.

        Returns:
            Logits [B, H, W, D, K/P] and [B, L-1, V/P]; or losses [B, H, W, D] and [B, L-1], fp32. None in place of the
            second where there are no captions.
        """
        with_caption = None if caption is None else self.caption
        if targets is None:
            logits = self.codes(head).unflatten(0, (-1, *self.shape[:2]))
            return logits, None if with_caption is None else with_caption(caption)
        assert cond is not None
        image = self._losses(self.codes, head, targets.flatten(0, 2)).view(-1, *self.shape)
        if with_caption is None or caption is None:
            return image, None
        return image, self._losses(with_caption, caption, cond[:, 1:])

    def _losses(self, classifier: CodeClassifier | CaptionClassifier, hidden: Tensor, targets: Tensor) -> Tensor:
        """[N, S, E] and targets [N, S] or [N, S, K/P] to [N, S]; logits live for some of the rows at a time."""
        rows = max(1, self.logits_at_once // (hidden.shape[1] * classifier.classes))

        def losses(hidden: Tensor, targets: Tensor) -> Tensor:
            return cross_entropy(classifier(hidden), targets, self.tp)

        if rows >= len(hidden):
            return losses(hidden, targets)
        parts = zip(hidden.split(rows), targets.split(rows), strict=True)
        return torch.cat([checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
