"""What the body and the head read: the condition, positions, and stacks of codes.

Codes enter as the frozen codebook's vectors through one Linear, or as learned embeddings. The codebook is a buffer of
each input that reads it, so that nothing is shared between pipeline stages; it is not part of the state dict, since
the RQ-VAE's file holds it. It is fp32 in bf16 training and sampling too: vectors are cast where they are projected.
Shapes: B batch, L condition length, T positions, D depth, E width, C codebook dim.
"""

import torch
from torch import Tensor, nn

from megarq.config.models import RQTransformerConfig
from megarq.parallel.layers import VocabParallelEmbedding
from megarq.parallel.topology import ALONE, TensorGroup


class CodeTable(nn.Module):
    """Vectors of codes, [..., D] to [..., D, width]: rows of one table, or of one table per depth laid end to end."""

    offsets: Tensor

    def __init__(self, sizes: tuple[int, ...], shared: bool) -> None:
        super().__init__()
        self.shared = shared
        starts = [0] * len(sizes) if shared else [sum(sizes[:depth]) for depth in range(len(sizes))]
        self.register_buffer("offsets", torch.tensor(starts), persistent=False)
        self.rows = sizes[0] if shared else sum(sizes)

    def index(self, codes: Tensor) -> Tensor:
        """Row of each code; `codes` may hold only the first depths."""
        return codes if self.shared else codes + self.offsets[: codes.shape[-1]]


class FrozenCodebook(CodeTable):
    """The RQ-VAE's codebook vectors; `load` must fill them before use."""

    vectors: Tensor

    def __init__(self, sizes: tuple[int, ...], shared: bool, codebook_dim: int) -> None:
        super().__init__(sizes, shared)
        self.register_buffer("vectors", torch.zeros(self.rows, codebook_dim, dtype=torch.float32), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        return nn.functional.embedding(self.index(codes), self.vectors)


class LearnedEmbedding(CodeTable):
    """Embeddings of codes, trained with the transformer."""

    def __init__(self, sizes: tuple[int, ...], shared: bool, embed_dim: int) -> None:
        super().__init__(sizes, shared)
        self.weight = nn.Parameter(torch.empty(self.rows, embed_dim))

    def forward(self, codes: Tensor) -> Tensor:
        return nn.functional.embedding(self.index(codes), self.weight)


class BodyInput(nn.Module):
    """[cond_emb(cond) + pos_cond ; sum_d input_mlp(c(k_td)) + pos_hw(t)] for t < T-1: [B, L+T-1, E]."""

    def __init__(
        self, config: RQTransformerConfig, codes: FrozenCodebook | LearnedEmbedding, tp: TensorGroup = ALONE
    ) -> None:
        super().__init__()
        width = config.embed_dim
        self.codes = codes
        self.projection = nn.Linear(config.codebook_dim, width) if isinstance(codes, FrozenCodebook) else nn.Identity()
        text = config.condition == "text"
        self.condition = VocabParallelEmbedding(config.cond_vocab_size, width, tp if text else ALONE)
        self.condition_positions = nn.Parameter(torch.empty(config.cond_length, width))
        self.positions = nn.Parameter(torch.empty(config.positions, width))

    def forward(self, codes: Tensor, cond: Tensor) -> Tensor:
        """`codes` [B, T, D] and `cond` [B, L] to [B, L+T-1, E]."""
        return torch.cat([self.embed_condition(cond), self.embed_codes(codes[:, :-1])], dim=1)

    def embed_condition(self, cond: Tensor) -> Tensor:
        """[B, L] to [B, L, E]."""
        return self.condition(cond) + self.condition_positions

    def embed_codes(self, codes: Tensor, first: int = 0) -> Tensor:
        """Stacks [B, S, D] at positions `first`, `first` + 1, .. to [B, S, E]."""
        vectors = self.projection(self.codes(codes).to(self.positions.dtype)).sum(dim=-2)
        return vectors + self.positions[first : first + codes.shape[1]]

    def embed_stack(self, stack: Tensor, position: Tensor) -> Tensor:
        """One stack [B, D] at the position that the device knows, int64 [1], to [B, 1, E]."""
        vectors = self.projection(self.codes(stack).to(self.positions.dtype)).sum(dim=-2)
        return (vectors + self.positions.index_select(0, position)).unsqueeze(1)


class HeadInput(nn.Module):
    """h_t, then head_mlp(sum_{i<=d} c(k_ti)) for d = 1..D-1, each + pos_d(d): [B*T, D, E]."""

    def __init__(self, config: RQTransformerConfig, codes: FrozenCodebook | LearnedEmbedding) -> None:
        super().__init__()
        frozen = isinstance(codes, FrozenCodebook)
        self.codes = codes
        self.cumulative = frozen and config.cumulative_depth
        self.projection = nn.Linear(config.codebook_dim, config.embed_dim) if frozen else nn.Identity()
        self.positions = nn.Parameter(torch.empty(config.depth, config.embed_dim))

    def forward(self, contexts: Tensor, codes: Tensor) -> Tensor:
        """Contexts [B, T, E] and codes [B, T, D] to [B*T, D, E]."""
        depths = self.embed_depths(codes[..., :-1])
        tokens = torch.cat([contexts.unsqueeze(-2), depths], dim=-2) + self.positions
        return tokens.flatten(0, 1)

    def embed_depths(self, codes: Tensor) -> Tensor:
        """What the codes of the first depths [..., d] tell the head about the depths after them, [..., d, E]."""
        vectors = self.codes(codes)
        if self.cumulative:
            vectors = vectors.float().cumsum(dim=-2)
        return self.projection(vectors.to(self.positions.dtype))

    def embed_step(self, context: Tensor, codes: Tensor) -> Tensor:
        """The head's next token [B, 1, E], given the context [B, E] and the d codes [B, d] drawn so far."""
        depth = codes.shape[-1]
        token = self._embed_last(codes) if depth else context
        return (token + self.positions[depth]).unsqueeze(1)

    def _embed_last(self, codes: Tensor) -> Tensor:
        """The last of `embed_depths`, [B, d] to [B, E]."""
        vectors = self.codes(codes)  # [B, d, C]
        last = vectors.float().sum(dim=-2) if self.cumulative else vectors[:, -1]
        return self.projection(last.to(self.positions.dtype))
