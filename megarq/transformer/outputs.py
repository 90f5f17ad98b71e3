"""From the last hidden states to logits over codes, and over caption tokens.

Shapes: B batch, L condition length, H x W = T positions, D depth, E width, K largest codebook, V caption vocabulary,
P tensor-parallel size: each rank gives its slice of the vocabularies.
"""

import torch
from torch import Tensor, nn

from megarq.config.models import RQTransformerConfig
from megarq.parallel.layers import ColumnParallelLinear, DepthParallelLinear
from megarq.parallel.topology import ALONE, TensorGroup

MASKED_LOGIT = -1e6
"""Logit of a code that a depth's codebook does not have; finite, so that a zero target keeps a zero loss."""


class CodeClassifier(nn.Module):
    """LayerNorm and Linear to the codes, shared by all depths or one for each."""

    absent: Tensor | None

    def __init__(self, config: RQTransformerConfig, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        largest = max(config.sizes)
        self.norm = nn.LayerNorm(config.embed_dim)
        self.linear: ColumnParallelLinear | DepthParallelLinear
        if config.shared_classifier:
            self.linear = ColumnParallelLinear(config.embed_dim, largest, tp=tp)
        else:
            self.linear = DepthParallelLinear(config.depth, config.embed_dim, largest, tp)
        ragged = len(set(config.sizes)) > 1
        absent = torch.arange(largest) >= torch.tensor(config.sizes).unsqueeze(1)  # [D, K]
        self.register_buffer("absent", absent.chunk(tp.size, -1)[tp.rank] if ragged else None, persistent=False)

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
        self.norm = nn.LayerNorm(config.embed_dim)
        self.linear = ColumnParallelLinear(config.embed_dim, config.cond_vocab_size, tp=tp)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(self.norm(hidden))


class Outputs(nn.Module):
    """Both classifiers, so that a pipeline's last stage holds all logits."""

    def __init__(self, config: RQTransformerConfig, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.shape = tuple(config.code_shape)
        self.codes = CodeClassifier(config, tp)
        self.caption = CaptionClassifier(config, tp) if config.condition == "text" else None

    def forward(self, head: Tensor, caption: Tensor) -> tuple[Tensor, Tensor | None]:
        """Head [B*T, D, E] and caption states [B, L-1, E] to [B, H, W, D, K/P] and [B, L-1, V/P] (or None)."""
        logits = self.codes(head).unflatten(0, (-1, *self.shape[:2]))
        return logits, None if self.caption is None else self.caption(caption)
