"""The discriminator: VQGAN's PatchGAN, which tells real patches from reconstructed ones (arXiv 2203.01941, 3.1).

Its parameters and buffers have the names of the released checkpoints' `discriminator`.
Shapes: B batch, R resolution, F filters, S side of the map of logits, C channels of a layer.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarq.parallel.collectives import copy_to, reduce_from
from megarq.parallel.initialization import normal_values
from megarq.parallel.topology import ALONE, TensorGroup

_STD = 0.02
"""Of first weights: convolutions' around 0, norms' around 1."""


class SharedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d over the joined batch of all ranks, which hold equal shares of it, forward and backward.

    torch's SyncBatchNorm does the same, but on GPUs alone. The running statistics are the same on all ranks.
    """

    def __init__(self, channels: int, ranks: TensorGroup = ALONE) -> None:
        """`ranks` share the batch."""
        super().__init__(channels)
        self._ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> fp32 [B, C, H, W]; collective in training, and so is its backward pass."""
        x = x.float()
        if not self.training or self._ranks.size == 1:
            return super().forward(x)
        count = x[:, 0].numel() * self._ranks.size
        mean = self._sum(x) / count
        centred = x - mean[:, None, None]
        variance = self._sum(centred.square()) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]

    def _sum(self, x: Tensor) -> Tensor:
        """Sums of the channels over all ranks, [C]; what each rank makes of them comes back to all."""
        return copy_to(reduce_from(x.sum((0, 2, 3)), self._ranks), self._ranks)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked += 1


class Discriminator(nn.Module):
    """Convolutions of 4x4: `layers` that halve the resolution, one more, and one to a logit for each patch."""

    def __init__(
        self, channels: int = 3, filters: int = 64, layers: int = 2, seed: int = 0, ranks: TensorGroup = ALONE
    ) -> None:
        """First weights from `seed`, the same on all of the `ranks`, which share the training batch."""
        super().__init__()
        widths = [filters * min(2**level, 8) for level in range(layers + 1)]
        main: list[nn.Module] = [nn.Conv2d(channels, filters, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, layers + 1):
            stride = 2 if level < layers else 1
            main += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride=stride, padding=1, bias=False),
                SharedBatchNorm2d(widths[level], ranks),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*main, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self._initialize(seed)

    @torch.no_grad()
    def _initialize(self, seed: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            else:
                values = normal_values(parameter.shape, _STD, seed, f"discriminator.{name}")
                parameter.copy_(values if parameter.dim() == 4 else values + 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, R, R] in [-1, 1] to fp32 logits [B, 1, S, S], S = R / 2**layers - 2; above 0 means real."""
        logits: Tensor = self.main(images)
        return logits


def smallest_resolution(layers: int) -> int:
    """The smallest R of which so many layers make a logit."""
    return 3 * 2**layers


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises, from its logits of real and of reconstructed images (Lim and Ye, 2017)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The same as the cross-entropy of two classes (Goodfellow et al., 2014)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """What the generator minimises, under either loss: -mean D(fake)."""
    return -fake.mean()


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"hinge": hinge_loss, "vanilla": vanilla_loss}
