from pathlib import Path

import lpips
import pytest
import torch
from random_vgg import random_features, write_vgg

from megarq.errors import ConfigError
from megarq.rqvae import perceptual
from megarq.rqvae.perceptual import LPIPS, SMALLEST_RESOLUTION, VGG_FILE, find_vgg


@pytest.fixture(scope="module")
def features() -> dict[str, torch.Tensor]:
    return random_features()


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vgg(tmp_path_factory.mktemp("vgg"))


def pictures(seed: int, side: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_distance_and_gradient_are_the_packages_own(vgg: Path, features: dict[str, torch.Tensor]) -> None:
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    theirs.net.load_state_dict(
        {name: features[f"features.{name.partition('.')[2]}"] for name in theirs.net.state_dict()}
    )
    ours, x = LPIPS(vgg), pictures(0).requires_grad_()
    expected = theirs(x, pictures(1)).mean()
    (gradient,) = torch.autograd.grad(expected, x)
    distance = ours(x, pictures(1))
    torch.testing.assert_close(distance, expected)
    torch.testing.assert_close(torch.autograd.grad(distance, x)[0], gradient)
    assert distance > 0.01


def test_equal_pictures_have_no_distance(vgg: Path) -> None:
    assert LPIPS(vgg)(pictures(0), pictures(0)) == 0


def test_the_smallest_resolution_has_a_distance(vgg: Path) -> None:
    loss = LPIPS(vgg)
    assert loss(pictures(0, SMALLEST_RESOLUTION), pictures(1, SMALLEST_RESOLUTION)) > 0
    with pytest.raises(RuntimeError, match="[Oo]utput size is too small"):
        loss(pictures(0, SMALLEST_RESOLUTION - 1), pictures(1, SMALLEST_RESOLUTION - 1))


def test_it_is_frozen_and_has_no_dropout_in_training(vgg: Path) -> None:
    loss = LPIPS(vgg).train()
    assert not any(p.requires_grad for p in loss.parameters())
    assert loss(pictures(0), pictures(1)) == loss(pictures(0), pictures(1))


def test_a_given_file_comes_before_the_cache(vgg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / VGG_FILE
    cached.parent.mkdir()
    cached.touch()
    assert find_vgg(vgg) == vgg and find_vgg() == cached


def test_without_a_file_the_message_says_where_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ConfigError) as refusal:
        find_vgg()
    expected = tmp_path / "checkpoints" / VGG_FILE
    for part in (str(expected), "download.pytorch.org/models/vgg16-397923af.pth", "loss.perceptual_weight=0"):
        assert part in str(refusal.value)


def test_a_given_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.pth \(--perceptual-weights\) does not exist"):
        find_vgg(tmp_path / "nowhere.pth")


def test_without_the_package_the_message_says_how_to_install_it(vgg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="Run pip install lpips, or train without it by loss.perceptual_weight=0"):
        find_vgg(vgg)


def test_a_file_of_another_network_is_refused(features: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({name: tensor for name, tensor in features.items() if ".28." not in name}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"other.pth is not vgg16-397923af.pth: features.28.weight is missing"):
        LPIPS(tmp_path / "other.pth")


@pytest.mark.parametrize("content", [b"", b"not weights at all"])
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.pth").write_bytes(content)
    with pytest.raises(ConfigError, match="broken.pth cannot be read"):
        LPIPS(tmp_path / "broken.pth")
