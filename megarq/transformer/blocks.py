"""Pre-norm transformer blocks, cut over a tensor group by attention heads and MLP columns.

Training and cached sampling run the same code: a key-value cache is an optional argument.
Shapes: B batch, S tokens given, E width, N heads, P tensor-parallel size, F = E / N head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarq.config.models import StackConfig
from megarq.errors import ConfigError
from megarq.parallel.layers import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from megarq.parallel.topology import ALONE, TensorGroup


class KeyValueCache:
    """Keys and values of the tokens seen so far by one attention layer, in buffers of fixed size."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        """`shape` is [B, N/P, most tokens, F]."""
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, N/P, S, F] and return all keys and values so far."""
        end = self.length + keys.shape[2]
        assert end <= self.keys.shape[2], "the cache was made for fewer tokens"
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reset(self) -> None:
        """Forget all tokens, keep the buffers."""
        self.length = 0


class SelfAttention(nn.Module):
    """Causal attention over N heads, N/P of them on each rank."""

    def __init__(self, embed_dim: int, heads: int, bias: bool, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        if heads % tp.size:
            raise ConfigError(f"{heads} attention heads over parallel.tp={tp.size}: choose a tp that divides them.")
        self.heads = heads // tp.size
        self.qkv = QKVParallelLinear(embed_dim, bias, tp)
        self.output = RowParallelLinear(embed_dim, embed_dim, bias, tp)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x))  # [B, N/P, S, F]
        fresh = cache is None or cache.length == 0
        assert fresh or x.shape[1] == 1, "tokens after the first call come one at a time"
        if cache is not None:
            k, v = cache.append(k, v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=fresh and x.shape[1] > 1)
        return self.output(y.transpose(1, 2).flatten(2))  # [B, S, E]


class MLP(nn.Module):
    """E to 4E, GELU, 4E to E."""

    def __init__(self, embed_dim: int, gelu: str, bias: bool, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.gelu = gelu
        self.up = ColumnParallelLinear(embed_dim, 4 * embed_dim, bias, tp)
        self.down = RowParallelLinear(4 * embed_dim, embed_dim, bias, tp)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        x = F.gelu(x) if self.gelu == "exact" else x * torch.sigmoid(1.702 * x)
        return self.down(x)


class Block(nn.Module):
    """x + attention(ln1(x)), then x + mlp(ln2(x)); dropout on both branches. [B, S, E] to [B, S, E]."""

    def __init__(self, embed_dim: int, stack: StackConfig, dropout: float, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(embed_dim)
        self.attention = SelfAttention(embed_dim, stack.heads, stack.attention_bias, tp)
        self.ln2 = nn.LayerNorm(embed_dim)
        self.mlp = MLP(embed_dim, stack.gelu, stack.mlp_bias, tp)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.ln1(x), cache))
        return x + self.dropout(self.mlp(self.ln2(x)))
