"""The RQ-VAE: images to stacks of codes and back (arXiv 2203.01941, section 3.1).

    images --encoder, quant_conv--> latents --quantizer--> codes
    codes --embed, sum over depths--> latents --post_quant_conv, decoder--> images

Shapes: B batch, R resolution, H and W of the code stack, D depth, K codebook size, C codebook dim.
"""

import hashlib
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megarq.config.models import RQVAEConfig
from megarq.errors import ConfigError, DataError
from megarq.parallel.topology import ALONE, TensorGroup
from megarq.rqvae.autoencoder import Decoder, Encoder
from megarq.rqvae.quantizer import Generators, ResidualQuantizer


class RQVAEOutput(NamedTuple):
    """What a training step needs of a batch."""

    reconstruction: Tensor
    """Images decoded from the quantized latents, fp32 [B, 3, R, R], not clamped."""
    commitment_loss: Tensor
    """How far the latents are from their codes, an unweighted fp32 scalar."""
    codes: Tensor
    """The argmin stacks, int64 [B, H, W, D]."""


class RQVAE(nn.Module):
    """Encoder, residual quantizer, decoder.

    Its parameters are the convolutions' alone; the codebooks are buffers, and stay fp32 when the model is cast.
    """

    def __init__(self, config: RQVAEConfig, process_group: dist.ProcessGroup | None = None, seed: int = 0) -> None:
        """`process_group` (none: all ranks) shares a training batch; `seed` decides first codes and restarts.

        Raises ConfigError where the configuration contradicts itself.
        """
        super().__init__()
        config.validate()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.codebook_dim, 1)
        self.quantizer = ResidualQuantizer(
            config.sizes,
            config.codebook_dim,
            shared=config.shared_codebook,
            decay=config.decay,
            restart_unused=config.restart_unused_codes,
            seed=seed,
            process_group=process_group,
        )
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, R, R] in [-1, 1] to latents [B, H, W, C]; DataError for another size."""
        expected = (self.config.image_channels, self.config.resolution, self.config.resolution)
        if tuple(images.shape[1:]) != expected:
            raise DataError(
                f"images of shape {list(images.shape)} for an RQ-VAE of [B, {', '.join(map(str, expected))}]: "
                "resize or crop them, or use a model of their resolution."
            )
        latents = self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype)))
        return latents.permute(0, 2, 3, 1).contiguous()

    def quantize(self, latents: Tensor) -> Tensor:
        """Latents [B, H, W, C] to their nearest stacks of codes, int64 [B, H, W, D]."""
        return self.quantizer.quantize(latents)

    def soft_codes(self, latents: Tensor, temperature: float = 0.5) -> Tensor:
        """Q(k | r_{d-1}) of every depth after the argmin codes before it, fp32 [B, H, W, D, K].

        The temperature is in units of squared distance; ConfigError unless above 0.
        """
        return self.quantizer.soft_codes(latents, temperature)

    def draw_codes(
        self, latents: Tensor, temperature: float, generator: Generators, tp: TensorGroup = ALONE
    ) -> tuple[Tensor, Tensor]:
        """Stochastic codes [B, H, W, D], each depth's drawn from Q after the draws before it, and that Q [..., D, K/P].

        `generator` may be on the CPU; a list of B of them makes each sample's draws independent of its batch. The codes
        are whole on every rank of `tp`, which must call this together; of Q each has its slice.
        """
        return self.quantizer.draw_codes(latents, temperature, generator, tp)

    def draw_hard_codes(
        self, latents: Tensor, temperature: float, generator: Generators, tp: TensorGroup = ALONE
    ) -> Tensor:
        """The codes of `draw_codes` alone, without the memory of Q."""
        return self.quantizer.draw_hard_codes(latents, temperature, generator, tp)

    def embed(self, codes: Tensor) -> Tensor:
        """Codebook vectors of codes, not summed: [B, H, W, D] -> fp32 [B, H, W, D, C]."""
        return self.quantizer.embed(codes)

    def decode(self, codes: Tensor, depth: int | None = None) -> Tensor:
        """Codes [B, H, W, D] to fp32 images [B, 3, R, R], not clamped, from the first `depth` depths (all by default).

        ConfigError for a depth that the model does not have.
        """
        if depth is not None and not 1 <= depth <= self.config.depth:
            raise ConfigError(
                f"decode(depth={depth}): this RQ-VAE has depths 1 to {self.config.depth}. Choose among them."
            )
        return self._decode_latents(self.embed(codes)[..., :depth, :].sum(-2))

    def forward(self, images: Tensor) -> RQVAEOutput:
        """Reconstruct images [B, 3, R, R]; in training mode the codebooks move too, so call it once for each batch."""
        quantized = self.quantizer(self.encode(images))
        return RQVAEOutput(self._decode_latents(quantized.latents), quantized.commitment_loss, quantized.codes)

    def codebook_weights(self) -> Tensor | list[Tensor]:
        """The shared codebook [K, C], or those of all depths [K_d, C]; without padding rows."""
        vectors = [self.quantizer.codebook(depth).vectors for depth in range(self.config.depth)]
        return vectors[0] if self.config.shared_codebook else vectors

    def _decode_latents(self, latents: Tensor) -> Tensor:
        features = latents.permute(0, 3, 1, 2).to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(features)).float()


@torch.no_grad()
def fingerprint(model: RQVAE) -> str:
    """sha256 (hex) of all parameters and codebook vectors, by name, as fp32: which RQ-VAE wrote a code shard.

    It survives saving and loading, and ignores the moving averages behind the codebooks.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    weights = model.codebook_weights()
    for index, vectors in enumerate([weights] if isinstance(weights, Tensor) else weights):
        tensors[f"quantizer.codebooks.{index}"] = vectors
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
