"""The convolutional encoder and decoder around the quantizer, after VQGAN (arXiv 2203.01941, section 3.1).

Shapes: B batch, R resolution of the images, H and W of the code stack.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megarq.config.models import RQVAEConfig
from megarq.rqvae.layers import DownLevel, Middle, UpLevel, group_norm


def _widths(config: RQVAEConfig) -> list[int]:
    """Channels of each level, from the images' resolution to the codes'."""
    return [config.channels * multiplier for multiplier in config.channel_multipliers]


def _has_attention(config: RQVAEConfig, level: int) -> bool:
    return config.resolution // 2**level in config.attention_resolutions


class Encoder(nn.Module):
    """Images to feature maps, halving the resolution between levels."""

    def __init__(self, config: RQVAEConfig) -> None:
        super().__init__()
        widths = _widths(config)
        inputs = [config.channels, *widths[:-1]]
        self.conv_in = nn.Conv2d(config.image_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(
                inputs[level],
                widths[level],
                config.res_blocks,
                _has_attention(config, level),
                config.dropout,
                last=level == len(widths) - 1,
            )
            for level in range(len(widths))
        )
        self.mid = Middle(widths[-1], config.dropout)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, R, R] in [-1, 1] -> [B, latent_channels, H, W]."""
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Feature maps to images: the encoder mirrored, with one more residual block in each level."""

    def __init__(self, config: RQVAEConfig) -> None:
        super().__init__()
        widths = _widths(config)
        inputs = [*widths[1:], widths[-1]]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.dropout)
        self.up = nn.ModuleList(  # numbered as the encoder's, by resolution, so run from the last to the first
            UpLevel(
                inputs[level],
                widths[level],
                config.res_blocks + 1,
                _has_attention(config, level),
                config.dropout,
                last=level == 0,
            )
            for level in range(len(widths))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, latent_channels, H, W] -> [B, 3, R, R], not clamped."""
        x = self.mid(self.conv_in(features))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
