"""The convolutional parts that encoder and decoder share, after VQGAN (arXiv 2012.09841).

Shapes: B batch, N channels, h height and w width of a feature map. Module names are those of the released checkpoints.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """The normalisation before every activation: 32 groups, eps 1e-6."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N_in, h, w] -> [B, N_out, h, w]."""
        branch = self.conv1(F.silu(self.norm1(x)))
        branch = self.conv2(self.dropout(F.silu(self.norm2(branch))))
        return self.nin_shortcut(x) + branch


class SpatialAttention(nn.Module):
    """x + attention over the h * w positions, with one head as wide as the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, h, w] -> [B, N, h, w]."""
        normed = self.norm(x)
        q, k, v = (project(normed).flatten(2).transpose(1, 2) for project in (self.q, self.k, self.v))  # [B, hw, N]
        mixed = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1))  # [B, 1, hw, N]
        return x + self.proj_out(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve height and width by a 3x3 convolution of stride 2, padded on the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, h, w] -> [B, N, h/2, w/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, h, w] -> [B, N, 2h, 2w]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the resolution has it."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool, dropout: float) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResidualBlock(widths[i], widths[i + 1], dropout) for i in range(blocks))
        self.attn = nn.ModuleList(SpatialAttention(out_channels) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N_in, h, w] -> [B, N_out, h, w]."""
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return x


class DownLevel(Level):
    """A level of the encoder; all but the last halve the resolution at their end."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, attention: bool, dropout: float, last: bool
    ) -> None:
        super().__init__(in_channels, out_channels, blocks, attention, dropout)
        self.downsample = nn.Identity() if last else Downsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N_in, h, w] -> [B, N_out, h/2, w/2], or h, w at the last level."""
        return self.downsample(super().forward(x))


class UpLevel(Level):
    """A level of the decoder; all but the last double the resolution at their end."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, attention: bool, dropout: float, last: bool
    ) -> None:
        super().__init__(in_channels, out_channels, blocks, attention, dropout)
        self.upsample = nn.Identity() if last else Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N_in, h, w] -> [B, N_out, 2h, 2w], or h, w at the last level."""
        return self.upsample(super().forward(x))


class Middle(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, dropout)
        self.attn_1 = SpatialAttention(channels)
        self.block_2 = ResidualBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, h, w] -> [B, N, h, w]."""
        return self.block_2(self.attn_1(self.block_1(x)))
