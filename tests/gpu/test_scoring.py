"""Scores of pictures and of reconstructions on a GPU against those on the CPU; skipped where there is none.

Torch computes convolutions of fp32 in TF32 on a GPU, of 10 bits: features are compared so, and once more, with the
scores that follow from them, in exact arithmetic. The command for reconstructions has that of its own accord.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from captioned_tars import small_rqvae
from scored_pictures import write_pictures
from scripts import load_script

from megarq.config.models import RQVAEConfig
from megarq.inference.pretrained import save_rqvae
from megarq.rqvae.codebook import exact_arithmetic
from megarq.rqvae.model import RQVAE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda"
COUNT, SIDE = 16, 16
NEURAL = ("open_clip", "timm", "torch_fidelity", "lpips")
"""Packages that the room of scores is built on."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inception.pth, vgg16-397923af.pth, both random, and pictures in generated/ and real/."""
    for package in NEURAL:
        pytest.importorskip(package)
    from random_inception import write_inception
    from random_vgg import write_vgg

    folder = tmp_path_factory.mktemp("scoring")
    write_inception(folder)
    write_vgg(folder)
    for seed, name in enumerate(("generated", "real")):
        write_pictures(folder / name, COUNT, seed, blur=1.0 + seed, size=(SIDE, SIDE))
    return folder


def features(files: Path, protocol: str, device: str) -> tuple[torch.Tensor, ...]:
    """Inception's features and logits of the generated pictures, on the CPU."""
    from megarq.data.pictures import PixelStream, open_pictures
    from megarq.scoring.networks import LAYERS, build_network
    from megarq.scoring.protocols import PROTOCOLS
    from megarq.scoring.weights import Weights

    (batch,) = PixelStream(open_pictures(str(files / "generated")), COUNT)
    layers = [LAYERS["inception"], PROTOCOLS[protocol].logits]
    weights = Weights("inception", files / "inception.pth")
    network = build_network("inception", PROTOCOLS[protocol], layers, weights, torch.device(device))
    with torch.no_grad():
        return tuple(seen.cpu() for seen in network.module(batch.pixels.to(device)))


def largest_error(ours: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """Norm of a picture's difference by the norm of what is expected, of the worst picture and layer."""
    return max(((a - b).norm(dim=1) / b.norm(dim=1)).max().item() for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("protocol", ["rq-paper", "torch-fidelity", "clean"])
def test_features_are_those_of_the_cpu(files, protocol):
    expected = features(files, protocol, "cpu")
    assert largest_error(features(files, protocol, DEVICE), expected) < 1e-2
    with exact_arithmetic(DEVICE):
        assert largest_error(features(files, protocol, DEVICE), expected) < 1e-4


def result(script: str, output: Path, *options: object) -> dict[str, Any]:
    """What a command writes."""
    load_script(script).main([*map(str, options), "--json", str(output)])
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_scores_are_those_of_the_cpu(files, tmp_path):
    command = ["evaluation/score.py", tmp_path / "scores.json", files / "generated", files / "real"]
    command += ["--protocol", "rq-paper", "--metrics", "fid,is,kid,prc", "--is-splits", 2]
    command += ["--feature-weights", f"inception={files / 'inception.pth'}"]
    with exact_arithmetic(DEVICE):
        ours, expected = (result(*command, "--device", device)["metrics"] for device in (DEVICE, "cpu"))
    assert ours["is"]["value"] - 1 == pytest.approx(expected["is"]["value"] - 1, rel=1e-2)  # 1 is the least there is
    for name in ("fid", "kid"):
        assert ours[name]["value"] == pytest.approx(expected[name]["value"], rel=1e-3), name
    for name in ("precision", "recall"):
        assert ours[name]["value"] == pytest.approx(expected[name]["value"], abs=1 / COUNT), name


def test_reconstructions_measure_as_on_the_cpu(files, tmp_path):
    """But for pixels that are rounded to the next level."""
    config = RQVAEConfig(**{**vars(small_rqvae(0).config), "resolution": SIDE})
    save_rqvae(RQVAE(config).eval(), tmp_path / "model")
    command = ["evaluation/reconstruction.py", tmp_path / "scores.json", "--model", tmp_path / "model", "--depths"]
    command += ["--data", files / "real", "--feature-weights", f"inception={files / 'inception.pth'}"]
    command += ["--perceptual-weights", files / "vgg16-397923af.pth"]
    ours, expected = (result(*command, "--device", device) for device in (DEVICE, "cpu"))
    assert ours["metrics"].keys() == expected["metrics"].keys() == {"rfid", "psnr", "ssim", "lpips"}
    for name, metric in expected["metrics"].items():
        assert ours["metrics"][name]["value"] == pytest.approx(metric["value"], rel=5e-3), name
    for mine, theirs in zip(ours["depths"], expected["depths"], strict=True):
        assert mine == pytest.approx(theirs, rel=5e-3)
    assert ours["codebook"]["usage"] == pytest.approx(expected["codebook"]["usage"], abs=2 / config.codebook_size)
