import pytest
import torch

from megarq.errors import ConfigError
from megarq.rqvae.losses import RQVAELoss
from megarq.rqvae.model import RQVAEOutput

IMAGES = torch.zeros(2, 3, 4, 4)
OUTPUT = RQVAEOutput(torch.full((2, 3, 4, 4), 2.0), torch.tensor(8.0), torch.zeros(2, 1, 1, 1))


@pytest.mark.parametrize(("kind", "reconstruction"), [("mse", 4.0), ("l1", 2.0)])
def test_terms(kind: str, reconstruction: float) -> None:
    terms = {name: float(value) for name, value in RQVAELoss(kind, commitment_weight=0.25)(IMAGES, OUTPUT).items()}
    assert terms == {"loss": reconstruction + 2.0, "reconstruction_loss": reconstruction, "commitment_loss": 2.0}


def test_term_of_a_subclass_is_part_of_the_loss() -> None:
    class Extended(RQVAELoss):
        def terms(self, images: torch.Tensor, output: RQVAEOutput) -> dict[str, torch.Tensor]:
            return {**super().terms(images, output), "extra_loss": torch.tensor(10.0)}

    assert Extended()(IMAGES, OUTPUT)["loss"] == 16.0


def test_unknown_reconstruction_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="use mse or l1"):
        RQVAELoss("huber")
