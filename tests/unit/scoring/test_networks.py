"""CLIP, DINOv2 and ResNet-101, in small where the architecture allows, with random weights."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

from megarq.errors import CheckpointError, ConfigError
from megarq.scoring import networks
from megarq.scoring.networks import Clip, build_network, resize_positions
from megarq.scoring.protocols import PROTOCOLS, prepare_dinov2
from megarq.scoring.rankers import ClassRanker, ClipRanker
from megarq.scoring.weights import Weights

CPU = torch.device("cpu")
PROMPTS = ["a red bus", "two cats on a sofa"]


def small_clip(quick_gelu: bool) -> CLIP:
    """ViT of patches of 8 in pictures of 32, and a text transformer, a layer or two each."""
    vision = CLIPVisionCfg(layers=2, width=64, patch_size=8, image_size=32)
    text = CLIPTextCfg(context_length=16, width=64, heads=1, layers=2)
    return CLIP(16, vision, text, quick_gelu=quick_gelu).eval()


@pytest.fixture(scope="module")
def clip_file(files: Path) -> Path:
    torch.manual_seed(0)
    torch.save(small_clip(True).state_dict(), files / "clip.pth")
    return files / "clip.pth"


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Two of 32x32."""
    noise = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return [Image.fromarray(array.numpy()) for array in noise]


@pytest.fixture(scope="module")
def pixels(pictures: list[Image.Image]) -> Tensor:
    return torch.stack([torchvision.transforms.functional.pil_to_tensor(picture) for picture in pictures])


def test_clip_scores_are_cosines_under_quick_gelu(clip_file, pictures, pixels):
    clip = Clip(Weights("clip", clip_file), CPU)
    found = clip.cosines(torch.stack([clip.view(picture) for picture in pictures]), PROMPTS)
    tokens = open_clip.SimpleTokenizer(context_length=16)(PROMPTS)
    expected = []
    for quick_gelu in (True, False):
        network = small_clip(quick_gelu)
        network.load_state_dict(torch.load(clip_file))
        mean, std = (
            torch.tensor(values).view(3, 1, 1)
            for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        )
        with torch.no_grad():
            images, texts = network.encode_image((pixels / 255 - mean) / std), network.encode_text(tokens)
        expected.append(F.cosine_similarity(images, texts))
    assert torch.allclose(found, expected[0], atol=1e-5)
    assert not torch.allclose(found, expected[1], atol=1e-4), "GELU is another network"


def test_a_clip_that_is_not_vit_b_32_is_told(clip_file):
    clip = Clip(Weights("clip", clip_file), CPU)
    unpublished, small = clip.notes
    assert clip.resize.startswith("short side to 32, bicubic")
    assert "the weights of clip have sha256" in unpublished and "not e6d1bd7789aa.." in unpublished
    assert small == "clip is CLIP ViT of width 64, patch 8: CLIP scores are published for ViT-B/32."


def test_a_file_that_is_no_clip_is_refused(files):
    torch.save(nn.Linear(1, 1).state_dict(), files / "linear.pth")
    with pytest.raises(
        CheckpointError, match="is no file of clip .*visual.proj, text_projection.*--feature-weights clip="
    ):
        Clip(Weights("clip", files / "linear.pth"), CPU)
    state = small_clip(True).state_dict()
    del state["ln_final.bias"]
    torch.save(state, files / "lacking.pth")
    with pytest.raises(CheckpointError, match='is no file of clip .*Missing key.*"ln_final.bias"'):
        Clip(Weights("clip", files / "lacking.pth"), CPU)


def test_the_clip_ranker_prefers_the_higher_cosine(clip_file, pictures, caplog):
    clip, rank = Clip(Weights("clip", clip_file), CPU), ClipRanker(clip_file, CPU)
    items = [SimpleNamespace(prompt=prompt, label=None) for prompt in PROMPTS]
    expected = clip.cosines(torch.stack([clip.view(picture) for picture in pictures]), PROMPTS)
    assert rank(pictures, items) == pytest.approx(expected.tolist(), abs=1e-6)
    assert rank.network == "clip" and rank.sha256 == clip.weights.sha256
    assert [record.getMessage() for record in caplog.records] == [f"ranker: {note}" for note in clip.notes]
    with pytest.raises(ConfigError, match="a picture without a prompt cannot be ranked by it"):
        rank(pictures, [SimpleNamespace(prompt=None, label=1)] * 2)


@pytest.fixture(scope="module")
def dinov2_file(files: Path) -> Path:
    """As Meta's files are: positions for 518x518, and a mask token; the small size."""
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=518)
    for name, parameter in network.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
    torch.save({**network.state_dict(), "mask_token": torch.zeros(1, 384)}, files / "dinov2.pth")
    return files / "dinov2.pth"


def test_dinov2_gives_the_normed_class_token(dinov2_file, pixels):
    built = build_network("dinov2", PROTOCOLS["clean"], ["cls"], Weights("dinov2", dinov2_file), CPU)
    [found] = built.module(pixels)
    state = torch.load(dinov2_file)
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224).eval()
    del state["mask_token"]
    network.load_state_dict({**state, "pos_embed": resize_positions(state["pos_embed"], 16)})
    with torch.no_grad():
        tokens = network.forward_features(prepare_dinov2("clean", pixels))
    assert found.shape == (2, 384) and torch.allclose(found, tokens[:, 0], atol=1e-5)
    assert built.resize.startswith("bicubic to 224x224, antialiased")
    unpublished, small = built.notes
    assert built.dim == 384 and "not d5383ea8f487..: scores cannot be held against published ones." in unpublished
    assert small == "dinov2 is of width 384: FD-DINOv2 is published for ViT-L/14, of width 1024."


def test_dinov2_under_a_protocol_of_ones_own_is_refused_before_the_pass(dinov2_file):
    with pytest.raises(ConfigError, match="fd-dinov2 under protocol digits"):
        build_network(
            "dinov2", replace(PROTOCOLS["clean"], name="digits"), ["cls"], Weights("dinov2", dinov2_file), CPU
        )


def test_positions_are_resized_on_metas_grid():
    """Cubic convolution with a = -0.75 at (i + 0.5) * 37 / 16.1 - 0.5: a tenth of a patch is added to the 16."""
    column = torch.rand(37, generator=torch.Generator().manual_seed(2))
    grid = column.view(1, 37, 1, 1).expand(1, 37, 37, 2).flatten(1, 2)
    resized = resize_positions(torch.cat([torch.full((1, 1, 2), 7.0), grid], 1), 16)
    assert resized.shape == (1, 257, 2) and (resized[:, 0] == 7).all()
    expected = []
    for row in range(16):
        place = (row + 0.5) * 37 / 16.1 - 0.5
        low = math.floor(place)
        taps = [(abs(place - at), column[min(max(at, 0), 36)]) for at in range(low - 1, low + 3)]
        near = [(1.25 * d**3 - 2.25 * d**2 + 1) * value for d, value in taps if d <= 1]
        far = [(-0.75 * d**3 + 3.75 * d**2 - 6 * d + 3) * value for d, value in taps if d > 1]
        expected.append(float(sum(near + far)))
    assert resized[0, 1:, 0].view(16, 16)[:, 8].tolist() == pytest.approx(expected, abs=1e-5)
    same = torch.rand(1, 257, 2)
    assert resize_positions(same, 16) is same


def test_a_file_that_is_no_dinov2_is_refused(files, dinov2_file):
    torch.save(nn.Linear(1, 1).state_dict(), files / "linear.pth")
    with pytest.raises(CheckpointError, match="is no file of dinov2"):
        build_network("dinov2", PROTOCOLS["clean"], ["cls"], Weights("dinov2", files / "linear.pth"), CPU)
    torch.save({"cls_token": torch.zeros(1, 1, 1536)}, files / "giant.pth")
    with pytest.raises(CheckpointError, match="DINOv2 of width 1536. Use one of width 384, 768, 1024."):
        build_network("dinov2", PROTOCOLS["clean"], ["cls"], Weights("dinov2", files / "giant.pth"), CPU)
    state = torch.load(dinov2_file)
    del state["norm.bias"]
    torch.save(state, files / "lacking.pth")
    with pytest.raises(CheckpointError, match='is no file of dinov2 .*Missing key.*"norm.bias"'):
        build_network("dinov2", PROTOCOLS["clean"], ["cls"], Weights("dinov2", files / "lacking.pth"), CPU)


def test_the_class_ranker_gives_the_probability_of_the_class(files, pictures, caplog):
    torch.manual_seed(0)
    network = torchvision.models.resnet101(num_classes=5).eval()
    torch.save(network.state_dict(), files / "resnet101.pth")
    rank = ClassRanker(files / "resnet101.pth", CPU, 5)
    large = [picture.resize((256, 256), Image.Resampling.BICUBIC) for picture in pictures]
    found = rank(large, [SimpleNamespace(prompt=None, label=label) for label in (3, 0)])
    centre = torch.stack([torchvision.transforms.functional.pil_to_tensor(p)[:, 16:240, 16:240] for p in large]) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = network((centre - mean) / std).softmax(1)
    assert "not 63fe2227.. or cd907fc2.." in caplog.text
    assert found == pytest.approx([float(expected[0, 3]), float(expected[1, 0])], abs=1e-5)
    for classes in (4, 6):
        with pytest.raises(ConfigError, match=f"--ranker-weights knows 5 classes, the model has {classes}. Give the"):
            ClassRanker(files / "resnet101.pth", CPU, classes)
    with pytest.raises(CheckpointError, match="is no file of resnet101"):
        torch.save(nn.Linear(1, 1).state_dict(), files / "linear.pth")
        ClassRanker(files / "linear.pth", CPU, 5)


@pytest.mark.parametrize(
    ("sha256", "side"), [("63fe2227", 256), ("cd907fc2", 232), ("0123abcd", 256)], ids=["V1", "V2", "another"]
)
def test_a_ranked_picture_is_resized_as_the_weights_want_it(sha256, side):
    picture = Image.effect_mandelbrot((300, 280), (-2, -1, 1, 1), 50).convert("RGB")
    height, width = side, int(300 * side / 280)
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    centre = torchvision.transforms.functional.pil_to_tensor(resized)[:, top : top + 224, left : left + 224] / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(networks.classifier_view(sha256 + "0" * 56)(picture), (centre - mean) / std, atol=1e-5)


def test_the_class_ranker_asks_torchvision_by_the_checksum_of_its_file(files, pictures, monkeypatch):
    """Where torchvision has published the very file, under a name that tells its checksum."""
    torch.save(torchvision.models.resnet101(num_classes=2).state_dict(), files / "two.pth")
    sha256 = Weights("resnet101", files / "two.pth").sha256
    seen = []

    def view(picture: Image.Image) -> Tensor:
        seen.append(picture.size)
        return torch.zeros(3, 32, 32)

    registry = [
        SimpleNamespace(url="https://a.b/resnet101-63fe2227.pth", transforms=lambda: None),
        SimpleNamespace(url=f"https://a.b/resnet101-{sha256[:8]}.pth", transforms=lambda: view),
    ]
    monkeypatch.setattr(networks, "ResNet101_Weights", registry)
    ClassRanker(files / "two.pth", CPU, 2)(pictures, [SimpleNamespace(prompt=None, label=1)] * 2)
    assert seen == [(32, 32)] * 2


@pytest.mark.full
def test_vgg16_is_torch_fidelitys(files, pixels):
    torch.manual_seed(0)
    network = torchvision.models.vgg16()
    torch.save(network.state_dict(), files / "vgg16.pth")
    built = build_network(
        "vgg16", PROTOCOLS["torch-fidelity"], ["fc2_relu"], Weights("vgg16", files / "vgg16.pth"), CPU
    )
    theirs = FeatureExtractorVGG16("vgg16", ["fc2_relu"], feature_extractor_weights_path=files / "vgg16.pth")
    [found], [expected] = built.module(pixels), theirs(pixels)
    assert found.shape == (2, 4096) and built.dim == 4096
    assert built.resize.startswith("bilinear to 224x224")
    assert torch.equal(found, expected) and found.std() > 1e-3 and not torch.equal(found[0], found[1])
