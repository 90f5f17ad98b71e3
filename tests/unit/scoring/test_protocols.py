"""What each protocol does to pictures, against the resize written out."""

import io
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import create_feature_extractor

from megarq.errors import CheckpointError, ConfigError
from megarq.scoring import protocols
from megarq.scoring.networks import build_network
from megarq.scoring.protocols import PROTOCOLS, CleanInception, RqPaperInception, find_protocol, prepare_dinov2
from megarq.scoring.weights import Weights, find_weights, parse_weights, read_state

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


@pytest.fixture
def pixels() -> Tensor:
    """Two pictures [2, 3, 20, 24] of noise."""
    return torch.randint(0, 256, (2, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def bilinear_by_hand(channel: np.ndarray, side: int, half: float) -> np.ndarray:
    """Two taps along each axis; `half` is 0.5 for half-pixel centres and 0 for TensorFlow 1's corner-aligned grid."""
    out = channel.astype(np.float64)
    for axis in (0, 1):
        length = out.shape[axis]
        place = np.maximum((np.arange(side) + half) * length / side - half, 0)
        low = np.minimum(place.astype(int), length - 1)
        high = np.minimum(low + 1, length - 1)
        weight = np.expand_dims(place - low, 1 - axis)
        out = np.take(out, low, axis) * (1 - weight) + np.take(out, high, axis) * weight
    return out


def test_rq_paper_feeds_bilinear_floats_from_minus_one_to_one(pixels):
    prepared = RqPaperInception.prepare(pixels)
    assert prepared.shape == (2, 3, 299, 299)
    expected = 2 * bilinear_by_hand(pixels[1, 2].numpy() / 255, 299, half=0.5) - 1
    assert np.allclose(prepared[1, 2].numpy(), expected, atol=1e-5)


def test_rq_paper_takes_the_floats_of_the_authors_too(pixels):
    floats = pixels.float() / 255 + 0.001
    assert torch.equal(RqPaperInception.prepare(pixels.float() / 255), RqPaperInception.prepare(pixels))
    shifted = RqPaperInception.prepare(floats) - RqPaperInception.prepare(pixels)
    assert torch.allclose(shifted, torch.full_like(shifted, 0.002), atol=1e-5)


def test_torch_fidelity_resizes_on_the_grid_of_tensorflow_1(pixels):
    resized = protocols.tensorflow_bilinear(pixels, 299)
    expected = bilinear_by_hand(pixels[0, 1].numpy(), 299, half=0.0)
    assert np.allclose(resized[0, 1].numpy(), expected, atol=2e-3)


def test_clean_resizes_each_channel_in_float_and_does_not_round(pixels):
    prepared = CleanInception.prepare(pixels)
    channel = Image.fromarray(pixels[1, 0].numpy().astype(np.float32))
    expected = (np.asarray(channel.resize((299, 299), Image.Resampling.BICUBIC)) - 128) / 128
    assert np.array_equal(prepared[1, 0].numpy(), expected)
    assert (prepared * 128 % 1).abs().max() > 0.01, "not whole grey levels"


def test_clean_averages_what_it_makes_smaller():
    board = (
        (torch.arange(598)[:, None] + torch.arange(598)).remainder(2).mul(255).to(torch.uint8).expand(1, 3, 598, 598)
    )
    inside = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    assert CleanInception.prepare(board)[inside].abs().max() < 0.05
    assert RqPaperInception.prepare(board)[inside].abs().max() < 0.05, "half-pixel centres lie between four pixels"
    assert ((protocols.tensorflow_bilinear(board, 299) - 128) / 128)[inside].abs().max() > 0.9, "every second pixel"


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_dinov2_is_fed_by_the_protocols_own_resize(pixels, protocol):
    prepared = prepare_dinov2(protocol, pixels)
    assert prepared.shape == (2, 3, 224, 224)
    channel = pixels[1, 2].numpy()
    if protocol == "clean":
        image = Image.fromarray(channel.astype(np.float32)).resize((224, 224), Image.Resampling.BICUBIC)
        resized = np.asarray(image).clip(0, 255)
    else:
        resized = bilinear_by_hand(channel, 224, half=0.5 if protocol == "rq-paper" else 0.0)
    assert np.allclose(prepared[1, 2].numpy(), (resized / 255 - 0.406) / 0.225, atol=1e-4)


def test_dinov2_under_a_protocol_of_ones_own_is_refused(pixels):
    with pytest.raises(
        ConfigError, match="fd-dinov2 under protocol digits: only rq-paper, torch-fidelity, clean say how"
    ):
        prepare_dinov2("digits", pixels)


def test_our_forward_is_torch_fidelitys_behind_the_same_resize(pixels, inception_file):
    class Theirs(CleanInception):
        @staticmethod
        def prepare(pixels: Tensor) -> Tensor:
            return (protocols.tensorflow_bilinear(pixels, 299) - 128) / 128

    layers = ["2048", "logits_unbiased", "logits"]
    ours, theirs = (
        kind("any", layers, feature_extractor_weights_path=inception_file)(pixels[:1])
        for kind in (Theirs, FeatureExtractorInceptionV3)
    )
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))
    assert ours[0].std() > 0.1


def test_the_protocols_stand_in_torch_fidelitys_registry(inception_file):
    tensors = io.BytesIO()
    torch.save(read_state(inception_file), tensors)
    tensors.seek(0)
    built = create_feature_extractor(
        "megarq-rq-paper", ["2048"], cuda=False, feature_extractor_weights_path=tensors, verbose=False
    )
    assert isinstance(built, RqPaperInception)


def test_an_unknown_protocol_is_refused():
    with pytest.raises(
        ConfigError, match="--protocol adm: no such protocol. Use one of rq-paper, torch-fidelity, clean"
    ):
        protocols.find_protocol("adm")
    assert PROTOCOLS["rq-paper"].describe()["resize"].startswith("bilinear to 299x299, half-pixel")


def test_a_protocol_may_come_from_a_file_with_a_network_of_its_own(tmp_path: Path) -> None:
    """The demo's; its network's weights are untrained here."""
    path = ROOT / "tools" / "demo" / "digit_protocol.py"
    protocol = find_protocol(str(path))
    assert (protocol.name, protocol.network) == ("digits", "digits")
    torch.manual_seed(0)
    network = runpy.run_path(str(path))["DigitNetwork"]()
    save_file(network.state_dict(), tmp_path / "digits.safetensors")
    weights = find_weights("digits", parse_weights([f"digits={tmp_path / 'digits.safetensors'}"]))
    built = build_network("digits", protocol, ["hidden", "logits"], weights, CPU)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    hidden, logits = built.module(pixels)
    assert hidden.shape == (3, built.dim) and torch.equal(logits, network(pixels)["logits"])
    with pytest.raises(CheckpointError, match="no file of digits"):
        save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
        build_network("digits", protocol, ["hidden"], Weights("digits", tmp_path / "other.safetensors"), CPU)


@pytest.mark.parametrize(("content", "said"), [(None, "no such file"), ("x = 1", "defines no PROTOCOL")])
def test_a_file_without_a_protocol_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "p.py").write_text(content)
    with pytest.raises(ConfigError, match=said):
        find_protocol(str(tmp_path / "p.py"))
