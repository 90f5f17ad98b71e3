import pytest
import torch

from megarq.errors import ConfigError
from megarq.rqvae.losses import RQVAELoss, adaptive_weight, last_layer_gradient
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


class MeanDistance(torch.nn.Module):
    """In place of LPIPS."""

    def forward(self, reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return (reconstruction - images).abs().mean()


def test_perceptual_term_has_its_weight() -> None:
    terms = RQVAELoss("mse", 0.25, MeanDistance(), perceptual_weight=1.5)(IMAGES, OUTPUT)
    assert terms["perceptual_loss"] == 3.0 and terms["loss"] == 4.0 + 3.0 + 2.0


def test_gradient_of_the_last_layer_is_autograds() -> None:
    layer, hidden = torch.nn.Conv2d(8, 3, 3, padding=1), torch.randn(2, 8, 6, 6)
    reconstruction = layer(hidden)
    gradient = torch.randn_like(reconstruction)
    (expected,) = torch.autograd.grad(reconstruction, layer.weight, gradient)
    torch.testing.assert_close(last_layer_gradient(hidden, gradient, layer.weight), expected)


def test_adaptive_weight_by_hand() -> None:
    assert adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])) == pytest.approx(5 / 2.0001)


@pytest.mark.parametrize(("images", "generator", "expected"), [(2.0, 0.0, 1e4), (0.0, 2.0, 0.0), (0.0, 0.0, 0.0)])
def test_adaptive_weight_stays_in_bounds(images: float, generator: float, expected: float) -> None:
    assert adaptive_weight(torch.tensor(images), torch.tensor(generator)) == expected
