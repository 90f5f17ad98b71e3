"""Parameters of both networks by part, from their configurations alone.

Legend: T positions, D depth, L condition length, E width, K codebook size, C codebook dim, V condition vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from megarq.config.models import RQTransformerConfig, RQVAEConfig, StackConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of a network, by part."""

    trainable: dict[str, int]
    """Parameters that the optimiser moves, by part."""
    frozen: dict[str, int]
    """Buffers that count as part of the network: codebooks, padding row included."""

    @property
    def trainable_total(self) -> int:
        """All parameters that the optimiser moves."""
        return sum(self.trainable.values())

    @property
    def total(self) -> int:
        """Trainable and frozen together."""
        return self.trainable_total + sum(self.frozen.values())


def block_parameters(embed_dim: int, stack: StackConfig) -> int:
    """One block: 12 E^2 + 13 E with all biases (two norms, attention's four matrices, an MLP of 4 E)."""
    norms = 4 * embed_dim
    attention = 4 * embed_dim**2 + (4 * embed_dim if stack.attention_bias else 0)
    mlp = 8 * embed_dim**2 + (5 * embed_dim if stack.mlp_bias else 0)
    return norms + attention + mlp


def transformer_parameters(config: RQTransformerConfig) -> Parameters:
    """The RQ-Transformer by part. The RQ-VAE's codebook, which it reads, is not counted: it belongs to the RQ-VAE."""
    width, largest, depth = config.embed_dim, max(config.sizes), config.depth
    linear = width * largest + largest
    parts = {
        "condition embedding": config.cond_vocab_size * width,
        "positions": (config.cond_length + config.positions + depth) * width,
        "code embedding": _code_embedding(config),
        "body": config.body.layers * block_parameters(width, config.body),
        "head": config.head.layers * block_parameters(width, config.head),
        "code classifier": 2 * width + (linear if config.shared_classifier else depth * linear),
        "caption classifier": 0,
    }
    if config.condition == "text":
        parts["caption classifier"] = 2 * width + width * config.cond_vocab_size + config.cond_vocab_size
    return Parameters({part: count for part, count in parts.items() if count}, {})


def _code_embedding(config: RQTransformerConfig) -> int:
    """input_mlp and head_mlp; or learned tables, which body and head share."""
    sources = (config.body_input, config.head_input)
    rows = config.sizes[0] if config.shared_embedding else sum(config.sizes)
    projections = sources.count("codebook") * (config.codebook_dim * config.embed_dim + config.embed_dim)
    return projections + (rows * config.embed_dim if "learned" in sources else 0)


@dataclass(frozen=True)
class Convolution:
    """A convolution of the RQ-VAE on a square feature map."""

    inputs: int
    """Channels in."""
    outputs: int
    """Channels out."""
    kernel: int
    """Side of the kernel."""
    side: int
    """Height and width of its output."""


@dataclass(frozen=True)
class Norm:
    """A GroupNorm."""

    channels: int
    """Channels, each with a scale and a shift."""


@dataclass(frozen=True)
class Attention:
    """Single-head attention over all positions of a feature map; its four 1x1 convolutions are layers of their own."""

    channels: int
    """Width of the head."""
    side: int
    """Height and width of the feature map."""


Layer = Convolution | Norm | Attention


def encoder_layers(config: RQVAEConfig) -> Iterator[Layer]:
    """Everything in the encoder and quant_conv that has parameters or costs products, in order."""
    side = config.resolution
    channels = config.channels
    yield Convolution(config.image_channels, channels, 3, side)
    for level, multiplier in enumerate(config.channel_multipliers):
        width = config.channels * multiplier
        for _ in range(config.res_blocks):
            yield from _block(channels, width, side)
            channels = width
            if side in config.attention_resolutions:
                yield from _attention(width, side)
        if level < len(config.channel_multipliers) - 1:
            side //= 2
            yield Convolution(channels, channels, 3, side)
    yield from _middle(channels, side)
    yield Norm(channels)
    yield Convolution(channels, config.latent_channels, 3, side)
    yield Convolution(config.latent_channels, config.codebook_dim, 1, side)


def decoder_layers(config: RQVAEConfig) -> Iterator[Layer]:
    """Everything in post_quant_conv and the decoder that has parameters or costs products, in order."""
    side = config.code_shape[0]
    channels = config.channels * config.channel_multipliers[-1]
    yield Convolution(config.codebook_dim, config.latent_channels, 1, side)
    yield Convolution(config.latent_channels, channels, 3, side)
    yield from _middle(channels, side)
    for level in reversed(range(len(config.channel_multipliers))):
        width = config.channels * config.channel_multipliers[level]
        for _ in range(config.res_blocks + 1):
            yield from _block(channels, width, side)
            channels = width
            if side in config.attention_resolutions:
                yield from _attention(width, side)
        if level > 0:
            side *= 2
            yield Convolution(channels, channels, 3, side)
    yield Norm(channels)
    yield Convolution(channels, config.image_channels, 3, side)


def _block(inputs: int, outputs: int, side: int) -> Iterator[Layer]:
    yield Norm(inputs)
    yield Convolution(inputs, outputs, 3, side)
    yield Norm(outputs)
    yield Convolution(outputs, outputs, 3, side)
    if inputs != outputs:
        yield Convolution(inputs, outputs, 1, side)


def _attention(channels: int, side: int) -> Iterator[Layer]:
    yield Norm(channels)
    for _ in range(4):
        yield Convolution(channels, channels, 1, side)
    yield Attention(channels, side)


def _middle(channels: int, side: int) -> Iterator[Layer]:
    yield from _block(channels, channels, side)
    yield from _attention(channels, side)
    yield from _block(channels, channels, side)


def discriminator_layers(channels: int, filters: int, layers: int, side: int) -> Iterator[Convolution]:
    """The discriminator's convolutions of 4x4, for images of height and width `side`."""
    widths = [channels, *(filters * min(2**level, 8) for level in range(layers + 1)), 1]
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        side = side // 2 if number < layers else side - 1
        yield Convolution(inputs, outputs, 4, side)


def perceptual_layers(side: int) -> tuple[list[Convolution], list[Convolution]]:
    """LPIPS for images of height and width `side`: VGG16's convolutions, and those of 1x1 that weight five of them."""
    network, weights, inputs = [], [], 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            network.append(Convolution(inputs, width, 3, side))
            inputs = width
        weights.append(Convolution(width, 1, 1, side))
        side //= 2
    return network, weights


def layer_parameters(layer: Layer) -> int:
    """Parameters of one layer, biases included."""
    if isinstance(layer, Convolution):
        return layer.kernel**2 * layer.inputs * layer.outputs + layer.outputs
    return 2 * layer.channels if isinstance(layer, Norm) else 0


def rqvae_parameters(config: RQVAEConfig) -> Parameters:
    """The RQ-VAE by part; its codebooks, moved by averages and not by gradients, are frozen and have K + 1 rows."""
    sizes = config.sizes[:1] if config.shared_codebook else config.sizes
    return Parameters(
        {
            "encoder": sum(map(layer_parameters, encoder_layers(config))),
            "decoder": sum(map(layer_parameters, decoder_layers(config))),
        },
        {"codebook": sum(size + 1 for size in sizes) * config.codebook_dim},
    )
