"""The RQ-VAE's training loss, as named terms (arXiv 2203.01941, section 3.1).

    reconstruction + 0.25 commitment + 1.0 LPIPS + lambda * 0.75 * G

G, the generator's loss, and lambda need a discriminator, and are there only in training with one.
Shapes: B batch, R resolution, H hidden channels before the decoder's last convolution.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from megarq.errors import ConfigError
from megarq.rqvae.model import RQVAEOutput

RECONSTRUCTION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss}
LARGEST_WEIGHT = 1e4
"""Where lambda is clamped."""
_EPS = 1e-4


class RQVAELoss(nn.Module):
    """Reconstruction + weight * commitment + weight * perceptual loss.

    A subclass adds a term by extending `terms`; the total is the sum of all of them.
    """

    def __init__(
        self,
        reconstruction: str = "mse",
        commitment_weight: float = 0.25,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
    ) -> None:
        """`perceptual` is an LPIPS, or None for no such term.

        Raises ConfigError for a reconstruction loss other than mse and l1.
        """
        super().__init__()
        if reconstruction not in RECONSTRUCTION_LOSSES:
            raise ConfigError(f"loss.reconstruction={reconstruction!r}: use mse or l1.")
        self.reconstruction = RECONSTRUCTION_LOSSES[reconstruction]
        self.commitment_weight = commitment_weight
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight

    def image_terms(self, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Weighted fp32 scalars by name: how far a reconstruction is from images, both [B, 3, R, R]."""
        terms = {"reconstruction_loss": self.reconstruction(reconstruction, images.float())}
        if self.perceptual is not None:
            terms["perceptual_loss"] = self.perceptual_weight * self.perceptual(reconstruction, images)
        return terms

    def terms(self, images: Tensor, output: RQVAEOutput) -> dict[str, Tensor]:
        """Weighted fp32 scalars by name, for images [B, 3, R, R] and what the model made of them."""
        return {
            **self.image_terms(images, output.reconstruction),
            "commitment_loss": self.commitment_weight * output.commitment_loss,
        }

    def forward(self, images: Tensor, output: RQVAEOutput) -> dict[str, Tensor]:
        """The terms, and their sum as "loss"."""
        terms = self.terms(images, output)
        return {"loss": sum(terms.values(), start=images.new_zeros((), dtype=output.commitment_loss.dtype)), **terms}


def last_layer_gradient(hidden: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    """Gradient [3, H, 3, 3] of the decoder's last convolution, whose input `hidden` is [B, H, R, R], in fp32.

    `gradient` [B, 3, R, R] is the reconstruction's. Autograd would give the same, but only through the hooks that
    DeepSpeed puts on an engine's outputs, which start to reduce gradients.
    """
    return conv2d_weight(hidden.float(), weight.shape, gradient.float(), padding=1)


def adaptive_weight(image_gradient: Tensor, generator_gradient: Tensor) -> Tensor:
    """lambda = |grad(reconstruction + perceptual)| / (|grad G| + 1e-4) at the last layer, clamped to [0, 1e4].

    The gradients must be those of the whole batch: of all ranks.
    """
    return (image_gradient.norm() / (generator_gradient.norm() + _EPS)).clamp(0, LARGEST_WEIGHT)
