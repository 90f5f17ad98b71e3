"""Floating-point operations per image: 2 for each multiply-add of a linear layer, convolution or attention product.

Norms, activations, embeddings and softmax are left out, as torch's FlopCounterMode does. Causal attention is counted in
full, not half: what the products cost before any kernel skips the masked part. Training is 3 x forward (backward: one
product for the inputs' gradients and one for the weights'); recomputation under activation checkpointing does not
count, so that an MFU stays comparable.

Legend: T positions, D depth, L condition length, E width, K codebook size, C codebook dim, V condition vocabulary.
"""

from collections.abc import Iterable

from megarq.config.models import RQTransformerConfig, RQVAEConfig
from megarq.config.run import RQVAERunConfig
from megarq.planning.counts import (
    Attention,
    Convolution,
    Layer,
    decoder_layers,
    discriminator_layers,
    encoder_layers,
    perceptual_layers,
)

TRAINING_FACTOR = 3


def block_flops(embed_dim: int, tokens: int, pairs: int | None = None) -> int:
    """One block on one sequence: 24 E^2 for each token in its matrices, 4 E for each pair of tokens in attention.

    `pairs` are those that attention multiplies, all by default.
    """
    return tokens * 24 * embed_dim**2 + 4 * embed_dim * (tokens**2 if pairs is None else pairs)


def transformer_tokens(config: RQTransformerConfig) -> dict[str, int]:
    """Tokens of one image: L + T - 1 in the body, T sequences of D in the head."""
    return {"body": config.cond_length + config.positions - 1, "head": config.positions * config.depth}


def layer_flops(config: RQTransformerConfig) -> dict[str, int]:
    """Forward pass of one image through each layer of `transformer.stages.layer_list`, in order."""
    width, positions, depth = config.embed_dim, config.positions, config.depth
    projected = {"codebook": 2 * config.codebook_dim * width, "learned": 0}
    body = block_flops(width, transformer_tokens(config)["body"])
    return {
        "body_input": (positions - 1) * depth * projected[config.body_input],
        **{f"body.{index}": body for index in range(config.body.layers)},
        "head_input": positions * (depth - 1) * projected[config.head_input],
        **{f"head.{index}": positions * block_flops(width, depth) for index in range(config.head.layers)},
        "outputs": sum(_classifier_flops(config)),
    }


def _classifier_flops(config: RQTransformerConfig) -> tuple[int, int]:
    """Of the codes' classifier and of the captions'."""
    codes = config.positions * config.depth * 2 * config.embed_dim * max(config.sizes)
    caption = (config.cond_length - 1) * 2 * config.embed_dim * config.cond_vocab_size
    return codes, caption if config.condition == "text" else 0


def transformer_flops(config: RQTransformerConfig) -> dict[str, int]:
    """Forward pass of one image through the RQ-Transformer, by part."""
    layers = layer_flops(config)
    codes, caption = _classifier_flops(config)
    parts = {
        "input_mlp": layers["body_input"],
        "head_mlp": layers["head_input"],
        "body": sum(flops for name, flops in layers.items() if name.startswith("body.")),
        "head": sum(flops for name, flops in layers.items() if name.startswith("head.")),
        "code classifier": codes,
        "caption classifier": caption,
    }
    return {part: flops for part, flops in parts.items() if flops}


def training_flops(config: RQTransformerConfig) -> int:
    """Forward and backward of one image: what an MFU is measured against."""
    return TRAINING_FACTOR * sum(transformer_flops(config).values())


def rqvae_flops(config: RQVAEConfig) -> dict[str, int]:
    """One image through the RQ-VAE, by part: encoder, search of the nearest codes, decoder."""
    side = config.code_shape[0]
    return {
        "encoder": _layer_flops(encoder_layers(config)),
        "quantizer": 2 * side**2 * config.codebook_dim * sum(config.sizes),
        "decoder": _layer_flops(decoder_layers(config)),
    }


def rqvae_training_flops(config: RQVAERunConfig, step: int) -> int:
    """Forward and backward of one image in a step, counted from 1, with LPIPS and a discriminator that has joined in.

    The search has no backward.
    """
    parts = rqvae_flops(config.model)
    total = TRAINING_FACTOR * (parts["encoder"] + parts["decoder"]) + parts["quantizer"]
    if config.loss.perceptual_weight:
        total += perceptual_training_flops(config.model.resolution)
    if config.loss.adversarial_weight and step > config.loss.discriminator_start:
        total += adversarial_training_flops(config)
    return total


def perceptual_training_flops(resolution: int) -> int:
    """LPIPS of an image and its reconstruction, which alone goes backward; its frozen weights have no gradients."""
    network, weights = map(_layer_flops, perceptual_layers(resolution))
    return 3 * network + 2 * weights


def adversarial_training_flops(config: RQVAERunConfig) -> int:
    """The discriminator and lambda on one image.

    The image and its reconstruction go forward; the generator's loss goes backward to the reconstruction, and the
    discriminator's to the weights of both passes, for which the first layer needs no gradient of its inputs. For
    lambda the decoder's last convolution has the gradients of its weights twice.
    """
    loss, model = config.loss, config.model
    sizes = model.image_channels, loss.discriminator_channels, loss.discriminator_layers, model.resolution
    first, *others = discriminator_layers(*sizes)
    *_, last = decoder_layers(model)
    return 5 * _layer_flops([first]) + 7 * _layer_flops(others) + 2 * _layer_flops([last])


def _layer_flops(layers: Iterable[Layer]) -> int:
    total = 0
    for layer in layers:
        if isinstance(layer, Convolution):
            total += 2 * layer.kernel**2 * layer.inputs * layer.outputs * layer.side**2
        elif isinstance(layer, Attention):
            total += 4 * layer.channels * layer.side**4
    return total
