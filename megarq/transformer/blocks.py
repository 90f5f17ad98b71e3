"""Pre-norm transformer blocks, cut over a tensor group by attention heads and MLP columns.

Training and cached sampling run the same code: a key-value cache is an optional argument. Under sequence parallelism
(see `parallel.collectives`) the hidden state is this rank's slice of the tokens, but whole where a cache is given:
sampling brings a token or two at a time. The argument `tokens` is S in the former case and 0 otherwise.
Shapes: B batch, S tokens given, E width, N heads, P tensor-parallel size, F = E / N head width, n = ceil(B S / P).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarq.config.models import StackConfig
from megarq.errors import ConfigError
from megarq.parallel.collectives import split_tokens
from megarq.parallel.layers import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from megarq.parallel.norms import LayerNorm
from megarq.parallel.topology import ALONE, TensorGroup


class Window(NamedTuple):
    """Where in the caches the next token goes, told on the device: such a step can be captured once and replayed."""

    place: Tensor
    """int64 [1]."""
    mask: Tensor
    """[W], what is added to the scores of the first W tokens of the caches: 0, or -inf where there is none yet."""


class KeyValueCache:
    """Keys and values of the tokens seen so far by one attention layer, in buffers of fixed size."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        """`shape` is [B, N/P, most tokens, F]."""
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # a masked token counts 0 times a finite value
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.window: Window | None = None
        """Where given, one token comes at a time, and this says where, in place of `length`."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, N/P, S, F] and return all keys and values so far, or those of the window."""
        if self.window is not None:
            read = len(self.window.mask)
            self.keys.index_copy_(2, self.window.place, keys)
            self.values.index_copy_(2, self.window.place, values)
            return self.keys[:, :, :read], self.values[:, :, :read]
        end = self.length + keys.shape[2]
        assert end <= self.keys.shape[2], "the cache was made for fewer tokens"
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reset(self) -> None:
        """Forget all tokens, keep the buffers."""
        self.length = 0
        self.window = None

    def clear(self) -> None:
        """Forget all tokens, and what is not finite in the buffers."""
        self.reset()
        self.keys.zero_()
        self.values.zero_()

    def like(self, batch: int, tokens: int) -> "KeyValueCache":
        """An empty cache of the same layer for so many sequences and tokens."""
        _, heads, _, width = self.keys.shape
        return KeyValueCache((batch, heads, tokens, width), self.keys.device, self.keys.dtype)


class SelfAttention(nn.Module):
    """Causal attention over N heads, N/P of them on each rank."""

    def __init__(self, embed_dim: int, heads: int, bias: bool, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        if heads % tp.size:
            raise ConfigError(f"{heads} attention heads over parallel.tp={tp.size}: choose a tp that divides them.")
        self.heads = heads // tp.size
        self.qkv = QKVParallelLinear(embed_dim, bias, tp)
        self.output = RowParallelLinear(embed_dim, embed_dim, bias, tp)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, tokens: int = 0) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x, tokens))
        window = None if cache is None else cache.window
        fresh = cache is None or (window is None and cache.length == 0)  # q, k and v are [B, N/P, S, F]
        assert fresh or q.shape[2] == 1, "tokens after the first call come one at a time"
        if cache is not None:
            k, v = cache.append(k, v)
        mask = None if window is None else window.mask.expand(len(q), self.heads, 1, -1)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=fresh and q.shape[2] > 1)
        return self.output(y.transpose(1, 2).flatten(2), tokens)  # [B, S, E] or [n, E]


class MLP(nn.Module):
    """E to 4E, GELU, 4E to E."""

    def __init__(self, embed_dim: int, gelu: str, bias: bool, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.gelu = gelu
        self.up = ColumnParallelLinear(embed_dim, 4 * embed_dim, bias, tp)
        self.down = RowParallelLinear(4 * embed_dim, embed_dim, bias, tp)

    def forward(self, x: Tensor, tokens: int = 0) -> Tensor:
        x = self.up(x, tokens)
        x = F.gelu(x) if self.gelu == "exact" else x * torch.sigmoid(1.702 * x)
        return self.down(x, tokens)


class Dropout(nn.Module):
    """nn.Dropout; of a slice of the tokens, the rows of the mask that nn.Dropout would draw for all tokens.

    Every rank draws the whole mask, so that the loss curve is that of tp=1.
    """

    def __init__(self, rate: float, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.rate = rate
        self.tp = tp

    def forward(self, x: Tensor, tokens: int = 0) -> Tensor:
        if not (tokens and self.training and self.rate):
            return F.dropout(x, self.rate, self.training)
        batch = len(x) * self.tp.size // tokens
        kept = F.dropout(x.new_ones(batch, tokens, x.shape[1]), self.rate) != 0  # [B, S, E]
        return x * split_tokens(kept, self.tp) * (1 / (1 - self.rate))


class Block(nn.Module):
    """x + attention(ln1(x)), then x + mlp(ln2(x)); dropout on both branches. [B, S, E] to [B, S, E].

    Under sequence parallelism, and without a cache, [n, E] to [n, E]; `tokens` is then S.
    """

    def __init__(
        self, embed_dim: int, stack: StackConfig, dropout: float, tp: TensorGroup = ALONE, *, tokens: int = 0
    ) -> None:
        super().__init__()
        assert tokens or not tp.sequence, "a slice of the tokens does not say how many make a sequence"
        self.tokens = tokens if tp.sequence else 0
        self.ln1 = LayerNorm(embed_dim, tp)
        self.attention = SelfAttention(embed_dim, stack.heads, stack.attention_bias, tp)
        self.ln2 = LayerNorm(embed_dim, tp)
        self.mlp = MLP(embed_dim, stack.gelu, stack.mlp_bias, tp)
        self.dropout = Dropout(dropout, tp)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        tokens = self.tokens if cache is None else 0
        x = x + self.dropout(self.attention(self.ln1(x), cache, tokens), tokens)
        return x + self.dropout(self.mlp(self.ln2(x), tokens), tokens)
