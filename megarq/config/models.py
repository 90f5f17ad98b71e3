"""What the two networks are made of. Defaults are those of the published 8x8x4 text-to-image system."""

from dataclasses import dataclass, field

from megarq.config.ranges import AMOUNT, COUNT, RATE, check_ranges
from megarq.errors import ConfigError


def _sizes_per_depth(codebook_size: int, codebook_sizes: list[int] | None, depth: int) -> tuple[int, ...]:
    if codebook_sizes is None:
        return (codebook_size,) * depth
    if len(codebook_sizes) != depth:
        raise ConfigError(
            f"model.codebook_sizes={list(codebook_sizes)}: {len(codebook_sizes)} sizes for {depth} depths. "
            "Give one size for each depth, or model.codebook_size alone."
        )
    return tuple(codebook_sizes)


@dataclass
class RQVAEConfig:
    """The RQ-VAE: VQGAN's convolutional encoder and decoder around a residual quantizer."""

    resolution: int = 256
    """Height and width of the images in pixels."""
    image_channels: int = 3
    """Colour channels of the images."""
    channels: int = 128
    """Channels of the first level."""
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4, 4])
    """Channels of each level, in units of `channels`; the resolution halves between levels."""
    res_blocks: int = 2
    """Residual blocks in each level of the encoder (the decoder has one more)."""
    attention_resolutions: list[int] = field(default_factory=lambda: [8])
    """Resolutions whose residual blocks are each followed by spatial attention."""
    latent_channels: int = 256
    """Channels between encoder and decoder, before `quant_conv`."""
    codebook_dim: int = 256
    """Length of a codebook vector (C)."""
    codebook_size: int = 16384
    """Codes in a codebook (K)."""
    codebook_sizes: list[int] | None = None
    """Codes of each depth's codebook where they differ; needs shared_codebook=false."""
    depth: int = 4
    """Codes in one position's stack (D)."""
    shared_codebook: bool = True
    """One codebook for all depths, or one for each."""
    decay: float = 0.99
    """Decay of the codebook's moving averages."""
    restart_unused_codes: bool = True
    """Replace codes whose moving count falls below 1 by random latents of the batch."""
    dropout: float = 0.0
    """Dropout inside the residual blocks."""

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """(H, W, D) of an image's code stack."""
        side = self.resolution // 2 ** (len(self.channel_multipliers) - 1)
        return side, side, self.depth

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codebook size of each depth."""
        return _sizes_per_depth(self.codebook_size, self.codebook_sizes, self.depth)

    def validate(self) -> None:
        """Raise ConfigError where a value is out of range or the fields contradict each other."""
        shape = ("resolution", "image_channels", "channels", "channel_multipliers", "res_blocks", "latent_channels")
        codebook = ("codebook_dim", "codebook_size", "codebook_sizes", "depth")
        check_ranges("model", self, **dict.fromkeys((*shape, *codebook), COUNT), decay=RATE, dropout=RATE)
        if not self.channel_multipliers:
            raise ConfigError("model.channel_multipliers=[]: give one multiplier for each level, such as [1,1,2].")
        if self.resolution % 2 ** (len(self.channel_multipliers) - 1):
            raise ConfigError(
                f"model.resolution={self.resolution}: {len(self.channel_multipliers)} levels halve it "
                f"{len(self.channel_multipliers) - 1} times. Use a multiple of "
                f"{2 ** (len(self.channel_multipliers) - 1)} or fewer model.channel_multipliers."
            )
        levels = [self.resolution // 2**level for level in range(len(self.channel_multipliers))]
        if not set(self.attention_resolutions) <= set(levels):
            raise ConfigError(
                f"model.attention_resolutions={list(self.attention_resolutions)}: the levels have {levels}. "
                "Choose among them."
            )
        widths = {self.channels * multiplier for multiplier in self.channel_multipliers}
        if any(width % 32 for width in widths):
            raise ConfigError(
                f"model.channels={self.channels}: GroupNorm has 32 groups, but the levels have "
                f"{sorted(widths)} channels. Use a multiple of 32."
            )
        if max(self.sizes) > 65536:
            raise ConfigError(f"codebook size {max(self.sizes)}: code shards store codes as uint16. Use at most 65536.")
        if self.shared_codebook and len(set(self.sizes)) > 1:
            raise ConfigError(
                f"model.codebook_sizes={list(self.sizes)}: a shared codebook has one size. "
                "Set model.shared_codebook=false."
            )


@dataclass
class StackConfig:
    """A stack of transformer blocks: the body or the head."""

    layers: int = 12
    """Blocks in the stack."""
    heads: int = 16
    """Attention heads."""
    gelu: str = "exact"
    """"exact", or "sigmoid" for x * sigmoid(1.702 x)."""
    attention_bias: bool = True
    """Biases in the query, key, value and output projections."""
    mlp_bias: bool = True
    """Biases in the MLP."""

    def validate(self, name: str) -> None:
        """Raise ConfigError where a value is out of range; `name` is the stack's key."""
        check_ranges(name, self, layers=AMOUNT, heads=COUNT)
        if self.gelu not in ("exact", "sigmoid"):
            raise ConfigError(f"{name}.gelu={self.gelu!r}: use exact or sigmoid.")


@dataclass
class RQTransformerConfig:
    """The RQ-Transformer: a body over positions and a head over depths."""

    code_shape: list[int] = field(default_factory=lambda: [8, 8, 4])
    """(H, W, D): height, width and depth of a code stack."""
    codebook_size: int = 16384
    """Codes that each depth chooses from (K)."""
    codebook_sizes: list[int] | None = None
    """Codes of each depth where they differ; needs shared_embedding=false and shared_classifier=false."""
    codebook_dim: int = 256
    """Length of a codebook vector (C)."""
    embed_dim: int = 1280
    """Width of the transformer (E)."""
    body: StackConfig = field(default_factory=lambda: StackConfig(layers=26, heads=20))
    """The stack over caption and positions."""
    head: StackConfig = field(default_factory=lambda: StackConfig(layers=4, heads=20))
    """The stack over the depths of one position."""
    cond_length: int = 32
    """Condition tokens before the image (L): caption length, or 1 for a class or none."""
    cond_vocab_size: int = 16384
    """Vocabulary of the condition: of the text tokenizer, the number of classes, or 1 for none."""
    dropout: float = 0.1
    """Dropout on each residual branch."""
    body_input: str = "codebook"
    """What the body reads: "codebook" vectors or "learned" embeddings."""
    head_input: str = "codebook"
    """What the head reads: "codebook" vectors or "learned" embeddings."""
    cumulative_depth: bool = True
    """The head reads sums over the depths so far (codebook vectors only)."""
    shared_embedding: bool = True
    """One table of learned embeddings for all depths, or one for each."""
    shared_classifier: bool = True
    """One classifier for all depths, or one for each."""

    @property
    def positions(self) -> int:
        """T, the positions of an image."""
        return self.code_shape[0] * self.code_shape[1]

    @property
    def depth(self) -> int:
        """D, the codes of one position."""
        return self.code_shape[2]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codebook size of each depth."""
        return _sizes_per_depth(self.codebook_size, self.codebook_sizes, self.depth)

    @property
    def condition(self) -> str:
        """What an image is asked for with: "text", "class" or "none"."""
        if self.cond_length > 1:
            return "text"
        return "class" if self.cond_vocab_size > 1 else "none"

    @property
    def uses_codebook(self) -> bool:
        """Whether any part reads the frozen codebook vectors."""
        return "codebook" in (self.body_input, self.head_input)

    def validate(self) -> None:
        """Raise ConfigError where a value is out of range or the fields contradict each other."""
        if len(self.code_shape) != 3:
            raise ConfigError(f"model.code_shape={list(self.code_shape)}: give height, width and depth.")
        counts = ("code_shape", "codebook_size", "codebook_sizes", "codebook_dim", "embed_dim", "cond_length")
        check_ranges("model", self, **dict.fromkeys((*counts, "cond_vocab_size"), COUNT), dropout=RATE)
        for name, stack in (("body", self.body), ("head", self.head)):
            stack.validate(f"model.{name}")
            if self.embed_dim % stack.heads:
                raise ConfigError(
                    f"model.{name}.heads={stack.heads} does not divide model.embed_dim={self.embed_dim}. "
                    "Choose a divisor: the heads share the width equally."
                )
        for name, value in (("body_input", self.body_input), ("head_input", self.head_input)):
            if value not in ("codebook", "learned"):
                raise ConfigError(f"model.{name}={value!r}: use codebook or learned.")
        if self.cond_length > 1 and self.cond_vocab_size == 1:
            raise ConfigError(
                f"model.cond_length={self.cond_length} with model.cond_vocab_size=1: a caption needs a vocabulary. "
                "Set model.cond_vocab_size to the tokenizer's, or model.cond_length=1 for no condition."
            )
        if len(set(self.sizes)) > 1 and (self.shared_classifier or (self._learns_embeddings and self.shared_embedding)):
            raise ConfigError(
                f"model.codebook_sizes={list(self.sizes)} with a shared table. Set model.shared_classifier=false "
                "and model.shared_embedding=false: depths of different size cannot share."
            )

    @property
    def _learns_embeddings(self) -> bool:
        return "learned" in (self.body_input, self.head_input)
