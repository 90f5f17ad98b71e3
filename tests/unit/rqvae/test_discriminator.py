import pytest
import torch
from torch import nn

from megarq.rqvae.discriminator import (
    DISCRIMINATOR_LOSSES,
    Discriminator,
    SharedBatchNorm2d,
    generator_loss,
    hinge_loss,
    smallest_resolution,
    vanilla_loss,
)

AUTHORS = {
    "main.0.weight": (64, 3, 4, 4),
    "main.0.bias": (64,),
    "main.2.weight": (128, 64, 4, 4),
    "main.3.weight": (128,),
    "main.3.bias": (128,),
    "main.3.running_mean": (128,),
    "main.3.running_var": (128,),
    "main.3.num_batches_tracked": (),
    "main.5.weight": (256, 128, 4, 4),
    "main.6.weight": (256,),
    "main.6.bias": (256,),
    "main.6.running_mean": (256,),
    "main.6.running_var": (256,),
    "main.6.num_batches_tracked": (),
    "main.8.weight": (1, 256, 4, 4),
    "main.8.bias": (1,),
}
"""The state dict of a released discriminator."""


def pictures(seed: int = 0, side: int = 16) -> torch.Tensor:
    return torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_state_dict_has_the_released_names_and_shapes() -> None:
    assert {name: tuple(tensor.shape) for name, tensor in Discriminator().state_dict().items()} == AUTHORS


def test_layers_are_those_of_vqgan() -> None:
    ours = Discriminator(filters=8)
    theirs = nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 16, 4, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.LeakyReLU(0.2),
        nn.Conv2d(16, 32, 4, 1, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 1, 4, 1, 1),
    )
    theirs.load_state_dict(ours.main.state_dict())
    assert torch.equal(ours(pictures()), theirs(pictures()))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_resolution_leaves_one_logit(layers: int) -> None:
    judge = Discriminator(filters=4, layers=layers).eval()
    side = smallest_resolution(layers)
    assert judge(pictures(side=side)).shape == (4, 1, 1, 1)
    with pytest.raises(RuntimeError, match="[Kk]ernel size"):
        judge(pictures(side=side - 2**layers))


def test_first_weights_are_small_and_follow_the_seed() -> None:
    first, again, other = (Discriminator(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["main.5.weight"], other["main.5.weight"])
    assert first["main.5.weight"].std() == pytest.approx(0.02, rel=0.01)
    assert first["main.6.weight"].mean() == pytest.approx(1, abs=0.01)
    assert not first["main.8.bias"].any()


def test_hinge_loss_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert hinge_loss(real, fake).item() == 0.5 * ((0 + 0.5) / 2 + (0 + 1.5) / 2)


def test_vanilla_loss_is_the_cross_entropy_of_two_classes() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    cross_entropy = nn.BCEWithLogitsLoss()
    expected = 0.5 * (cross_entropy(real, torch.ones(2)) + cross_entropy(fake, torch.zeros(2)))
    torch.testing.assert_close(vanilla_loss(real, fake), expected)


def test_generator_loss_by_hand() -> None:
    assert generator_loss(torch.tensor([-3.0, 0.5])).item() == 1.25


@pytest.mark.parametrize("name", DISCRIMINATOR_LOSSES)
def test_a_discriminator_learns_to_tell_two_kinds_of_pictures_apart(name: str) -> None:
    judge = Discriminator(filters=8)
    adam = torch.optim.Adam(judge.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for step in range(30):
        loss = DISCRIMINATOR_LOSSES[name](judge(pictures(step)), judge(pictures(step).abs()))
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert (judge(pictures(99)) > 0).float().mean() > 0.9 > 0.1 > (judge(pictures(99).abs()) > 0).float().mean()


def test_batch_norm_alone_is_torchs() -> None:
    ours, theirs, x = SharedBatchNorm2d(3), nn.BatchNorm2d(3), pictures()
    for _ in range(2):
        assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
