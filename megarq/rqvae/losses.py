"""The RQ-VAE's training loss, as named terms (arXiv 2203.01941, section 3.1).

Shapes: B batch, R resolution.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from megarq.errors import ConfigError
from megarq.rqvae.model import RQVAEOutput

RECONSTRUCTION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss}


class RQVAELoss(nn.Module):
    """Reconstruction + weight * commitment.

    A subclass adds a term by extending `terms`; the total is the sum of all of them.
    """

    def __init__(self, reconstruction: str = "mse", commitment_weight: float = 0.25) -> None:
        """Raises ConfigError for a reconstruction loss other than mse and l1."""
        super().__init__()
        if reconstruction not in RECONSTRUCTION_LOSSES:
            raise ConfigError(f"loss.reconstruction={reconstruction!r}: use mse or l1.")
        self.reconstruction = RECONSTRUCTION_LOSSES[reconstruction]
        self.commitment_weight = commitment_weight

    def terms(self, images: Tensor, output: RQVAEOutput) -> dict[str, Tensor]:
        """Weighted fp32 scalars by name, for images [B, 3, R, R] and what the model made of them."""
        return {
            "reconstruction_loss": self.reconstruction(output.reconstruction, images.float()),
            "commitment_loss": self.commitment_weight * output.commitment_loss,
        }

    def forward(self, images: Tensor, output: RQVAEOutput) -> dict[str, Tensor]:
        """The terms, and their sum as "loss"."""
        terms = self.terms(images, output)
        return {"loss": sum(terms.values(), start=images.new_zeros((), dtype=output.commitment_loss.dtype)), **terms}
