"""The networks behind the scores, built from files: Inception, VGG-16, DINOv2, CLIP, ResNet-101.

A feature network takes uint8 [B, 3, H, W] and gives a tuple of float32 [B, dim], one for each of its layers.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import open_clip
import timm
import torch
import torch.nn.functional as F
import torchvision
from open_clip.model import build_model_from_openai_state_dict
from PIL import Image
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch_fidelity.utils import create_feature_extractor
from torchvision.models import ResNet101_Weights

from megarq.errors import CheckpointError
from megarq.scoring.protocols import DINOV2_SIDE, FEATURES, Protocol, dinov2_resize, prepare_dinov2
from megarq.scoring.weights import NETWORKS, Network, Weights, misfit

VGG16_LAYER = "fc2_relu"
DINOV2_LAYER = "cls"
LAYERS = {"inception": FEATURES, "vgg16": VGG16_LAYER, "dinov2": DINOV2_LAYER}
"""The layer of each network whose statistics and distances are taken."""
DIMENSIONS = {"inception": 2048, "vgg16": 4096, "dinov2": 1024}
"""Of that layer, in the published network."""
_DINOV2 = {384: "small", 768: "base", 1024: "large"}
"""Sizes of DINOv2, by width, that share one architecture."""
_PATCH = 14
"""Its patches, in pixels."""
_VGG16_RESIZE = "bilinear to 224x224 as TensorFlow 1 has it: corner-aligned grid, no antialiasing"
"""torch-fidelity's, whatever the protocol."""


Build = Callable[[Mapping[str, Tensor]], nn.Module]
"""From the tensors of a file to a network: uint8 [B, 3, H, W] -> {layer: float [B, dim]}."""
_OWN: dict[str, Build] = {}


def register_network(name: str, source: Network, layer: str, dim: int, build: Build) -> None:
    """Add a network of one's own to those that scores can be computed with; see tools/demo/digit_protocol.py.

    layer, dim: the layer whose statistics and distances are taken, and its width.
    """
    NETWORKS[name], LAYERS[name], DIMENSIONS[name], _OWN[name] = source, layer, dim, build


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that turns pictures into features."""

    name: str
    """As in NETWORKS."""
    layers: tuple[str, ...]
    """What it gives, in order."""
    module: Callable[[Tensor], tuple[Tensor, ...]]
    """uint8 [B, 3, H, W] -> float32 [B, dim] for each layer."""
    weights: Weights
    """The file it was built from."""
    dim: int
    """Of the layer whose statistics are taken."""
    resize: str
    """From the pictures' size to its own, as a result tells it."""
    notes: tuple[str, ...] = ()
    """What a result should say about it."""


def build_network(
    name: str, protocol: Protocol, layers: Sequence[str], weights: Weights, device: torch.device
) -> FeatureNetwork:
    """Build inception, vgg16, dinov2 or one that was registered.

    Raises: CheckpointError for a file of something else, naming its keys; ConfigError for dinov2 under a protocol that
    does not say how it is fed.
    """
    notes = weights.notes
    if name in _OWN:
        own = _build_own(layers, weights, device)
        return FeatureNetwork(name, tuple(layers), own, weights, DIMENSIONS[name], protocol.resize)
    if name == "dinov2":
        resize = dinov2_resize(protocol.name).told
        dinov2 = _build_dinov2(weights).to(device)
        if dinov2.embed_dim != DIMENSIONS["dinov2"]:
            notes.append(
                f"dinov2 is of width {dinov2.embed_dim}: FD-DINOv2 is published for ViT-L/14, of width "
                f"{DIMENSIONS['dinov2']}."
            )

        def features(pixels: Tensor) -> tuple[Tensor, ...]:
            return (dinov2(prepare_dinov2(protocol.name, pixels)),)

        return FeatureNetwork(name, tuple(layers), features, weights, dinov2.embed_dim, resize, tuple(notes))
    extractor, resize = (protocol.extractor, protocol.resize) if name == "inception" else ("vgg16", _VGG16_RESIZE)
    module = _build_fidelity(extractor, layers, weights, device)
    return FeatureNetwork(name, tuple(layers), module, weights, DIMENSIONS[name], resize, tuple(notes))


def _build_own(layers: Sequence[str], weights: Weights, device: torch.device) -> Callable[[Tensor], tuple[Tensor, ...]]:
    try:
        module = _OWN[weights.network](weights.read()).to(device).eval().requires_grad_(False)
    except (RuntimeError, KeyError) as error:
        raise misfit(weights, error) from error

    def features(pixels: Tensor) -> tuple[Tensor, ...]:
        seen = module(pixels)
        return tuple(seen[layer] for layer in layers)

    return features


def _build_fidelity(extractor: str, layers: Sequence[str], weights: Weights, device: torch.device) -> nn.Module:
    """An extractor of torch-fidelity's registry.

    torch-fidelity unpickles whatever the file holds, so it gets the tensors, read by us, written to memory.
    """
    tensors = io.BytesIO()
    torch.save(weights.read(), tensors)
    tensors.seek(0)
    try:
        module: nn.Module = create_feature_extractor(
            extractor, list(layers), cuda=False, feature_extractor_weights_path=tensors, verbose=False
        )
    except RuntimeError as error:
        raise misfit(weights, error) from error
    return module.to(device)


def _build_dinov2(weights: Weights) -> VisionTransformer:
    """DINOv2 at 224x224, whose features are the normed class token; Meta's file or timm's."""
    state = weights.read()
    width = state["cls_token"].shape[-1] if "cls_token" in state else DIMENSIONS["dinov2"]
    if width not in _DINOV2:
        sizes = ", ".join(map(str, _DINOV2))
        raise CheckpointError(f"{weights.path}: DINOv2 of width {width}. Use one of width {sizes}.")
    name = f"vit_{_DINOV2[width]}_patch14_dinov2"
    with torch.device("meta"):
        model = timm.create_model(name, img_size=DINOV2_SIDE, num_classes=0)
    assert isinstance(model, VisionTransformer), "every DINOv2 of timm is one"
    try:
        state["pos_embed"] = resize_positions(state["pos_embed"], DINOV2_SIDE // _PATCH)
        model.load_state_dict(checkpoint_filter_fn(state, model), assign=True)
    except (RuntimeError, KeyError) as error:
        raise misfit(weights, error) from error
    return model.float().eval().requires_grad_(False)


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings [1, 1 + n * n, E] for side x side patches, [1, 1 + side * side, E].

    As Meta's code does it, bicubic with a tenth of a patch added, without antialiasing; timm's own way differs.
    """
    old = round((positions.shape[1] - 1) ** 0.5)
    if old == side:
        return positions
    grid = positions[:, 1:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    scale = (side + 0.1) / old
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)], 1)


class Clip:
    """OpenAI's CLIP through open_clip: cosines between pictures and their captions."""

    def __init__(self, weights: Weights, device: torch.device) -> None:
        """The architecture is that of the tensors, with QuickGELU, as OpenAI's networks were trained.

        Raises: CheckpointError for a file of something else.
        """
        state = weights.read()
        if "visual.proj" not in state or "text_projection" not in state:
            raise misfit(weights, RuntimeError("\nMissing key(s) in state_dict: visual.proj, text_projection"))
        try:
            model = build_model_from_openai_state_dict(state, quick_gelu=True).float()
            model.load_state_dict(state)  # again, since building rounds to half precision
        except (RuntimeError, KeyError, AssertionError) as error:
            raise misfit(weights, error) from error
        self.weights = weights
        self._model = model.to(device).eval().requires_grad_(False)
        self._device = device
        side = model.visual.image_size[0]
        self.name = f"CLIP ViT of width {state['visual.conv1.weight'].shape[0]}, patch {model.visual.patch_size[0]}"
        self._preprocess = open_clip.image_transform(
            side, is_train=False, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
        )
        self.resize = f"short side to {side}, bicubic, antialiased, in 8 bits (Pillow), and the centre {side}x{side}"
        self._tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
        self.notes = weights.notes
        if not self._is_b32(state):
            self.notes.append(f"clip is {self.name}: CLIP scores are published for ViT-B/32.")

    @staticmethod
    def _is_b32(state: dict[str, Tensor]) -> bool:
        return state["visual.conv1.weight"].shape == (768, 3, 32, 32) and state["text_projection"].shape == (512, 512)

    def view(self, picture: Image.Image) -> Tensor:
        """A picture as the network takes it, [3, S, S]: short side to S, bicubic, the centre, normalised."""
        view: Tensor = self._preprocess(picture)
        return view

    @torch.no_grad()
    def cosines(self, views: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines [B], float32 on the CPU, of views [B, 3, S, S] with captions, of which 77 tokens are read."""
        images = self._model.encode_image(views.to(self._device), normalize=True)
        texts = self._model.encode_text(self._tokenizer(list(prompts)).to(self._device), normalize=True)
        cosines: Tensor = (images * texts).sum(1).float().cpu()
        return cosines


def classifier_view(sha256: str) -> Callable[[Image.Image], Tensor]:
    """How torchvision feeds the ResNet-101 of a file: [3, 224, 224], normalised, of the centre.

    The short side becomes 232 for its second weights, and 256 for its first, and for files that it did not publish.
    """
    published = {weights.url.rpartition("-")[2].partition(".")[0]: weights for weights in ResNet101_Weights}
    known = [weights for begins, weights in published.items() if sha256.startswith(begins)]
    view: Callable[[Image.Image], Tensor] = (known or [ResNet101_Weights.IMAGENET1K_V1])[0].transforms()
    return view


class Classifier:
    """torchvision's ResNet-101 of ImageNet."""

    def __init__(self, weights: Weights, device: torch.device) -> None:
        """Raises: CheckpointError for a file of something else."""
        state = weights.read()
        with torch.device("meta"):
            model = torchvision.models.resnet101(num_classes=len(state.get("fc.bias", range(1000))))
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise misfit(weights, error) from error
        self.weights, self.notes = weights, weights.notes
        self.classes = model.fc.out_features
        self._model = model.to(device).eval().requires_grad_(False)
        self._device = device
        self._preprocess = classifier_view(weights.sha256)

    @torch.no_grad()
    def probabilities(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[B, classes], float32 on the CPU."""
        views = torch.stack([self._preprocess(picture.convert("RGB")) for picture in pictures])
        probabilities: Tensor = self._model(views.to(self._device)).float().softmax(1).cpu()
        return probabilities
