"""What drawing a batch of pictures must read and compute, and the least time that takes.

    body       reads the conditions' L tokens in one step, then T - 1 stacks in a step each
    head       draws each of the T * D codes in a step, whose last part is the classifier
    decoder    of the RQ-VAE, once for the batch

A step reads its weights once, whatever the batch, and for each picture the keys and values of the tokens that there
are, its own included; equal conditions pass once. Left out is what is small beside these: activations, logits, what is
written, and the rows of embeddings and codebooks. With guidance each picture is two rows of a batch.

Legend: T positions, D depth, L condition length, E width, K codebook size, C codebook dim.
"""

from dataclasses import dataclass

from megarq.config.models import RQTransformerConfig, RQVAEConfig
from megarq.planning.counts import block_parameters, rqvae_parameters
from megarq.planning.flops import block_flops, rqvae_flops, transformer_flops


@dataclass(frozen=True)
class Work:
    """What a part of drawing a batch takes."""

    weights: int
    """Bytes of weights read, over all steps."""
    caches: int
    """Bytes of keys and values read, over all steps."""
    flops: int
    """FLOPs: 2 for each multiply-add."""

    def seconds(self, bandwidth: float, peak: float) -> float:
        """At `bandwidth` bytes and then `peak` FLOPs per second, as if nothing else took time."""
        return (self.weights + self.caches) / bandwidth + self.flops / peak


def codes_work(config: RQTransformerConfig, batch: int, conditions: int, bytes_each: int, guided: bool = False) -> Work:
    """Drawing the codes of a batch with caches of keys and values.

    Args:
        config: the RQ-Transformer's.
        batch: pictures.
        conditions: how many different ones they have.
        bytes_each: size of a number.
        guided: whether each picture is drawn below its condition and below the null condition, which is one more.
    """
    rows, conditions = (2 * batch, conditions + 1) if guided else (batch, conditions)
    return Work(
        bytes_each * _weights_read(config),
        rows * bytes_each * _cached_numbers(config),
        conditions * condition_flops(config) + rows * stacks_flops(config),
    )


def decoding_work(config: RQVAEConfig, batch: int, bytes_each: int) -> Work:
    """Decoding the codes of a batch in one pass, with numbers of so many bytes."""
    weights = bytes_each * rqvae_parameters(config).trainable["decoder"]
    return Work(weights, 0, batch * rqvae_flops(config)["decoder"])


def condition_flops(config: RQTransformerConfig) -> int:
    """Reading one condition."""
    return config.body.layers * block_flops(config.embed_dim, config.cond_length)


def stacks_flops(config: RQTransformerConfig) -> int:
    """Drawing all stacks of one picture, and reading all but the last."""
    parts = transformer_flops(config)
    body = block_flops(config.embed_dim, config.positions - 1, _pairs_of_stacks(config))
    head = config.positions * block_flops(config.embed_dim, config.depth, _pairs_of_depths(config))
    projected = sum(parts.get(part, 0) for part in ("input_mlp", "head_mlp", "code classifier"))
    return config.body.layers * body + config.head.layers * head + projected


def _weights_read(config: RQTransformerConfig) -> int:
    """Numbers in all weights of all steps."""
    width, largest = config.embed_dim, max(config.sizes)
    projection = config.codebook_dim * width + width
    body = config.body.layers * block_parameters(width, config.body)
    head = config.head.layers * block_parameters(width, config.head)
    classifier = 2 * width + width * largest + largest
    positions, codes = config.positions, config.positions * config.depth
    return (
        positions * body
        + (positions - 1) * projection * (config.body_input == "codebook")
        + codes * (head + classifier)
        + (codes - positions) * projection * (config.head_input == "codebook")
    )


def _cached_numbers(config: RQTransformerConfig) -> int:
    """Keys and values that one picture's steps read."""
    body = config.body.layers * _pairs_of_stacks(config)
    head = config.head.layers * config.positions * _pairs_of_depths(config)
    return 2 * config.embed_dim * (body + head)


def _pairs_of_stacks(config: RQTransformerConfig) -> int:
    """(token, token it sees) of the T - 1 stacks that the body reads: L + 1 of the first, one more of each other."""
    later = config.positions - 1
    return later * config.cond_length + later * (later + 1) // 2


def _pairs_of_depths(config: RQTransformerConfig) -> int:
    """The same of the head, for one position."""
    return config.depth * (config.depth + 1) // 2
