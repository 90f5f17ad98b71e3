"""Pictures through a frozen RQ-VAE, so that a sample's bytes depend on its block alone.

A block of up to 1,024 samples is encoded in batches of one fixed size, the last one filled up with zeros, and no batch
crosses a block. Convolutions are fp32 without TF32, or bf16 or fp16 where asked; distances are always fp32. A drawn
stack comes from a generator of (seed, sample key, draw).

Shapes: b batch, n block, R resolution, H, W, D code shape, K codebook size, C codebook dim.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megarq.data.code_writer import CodeBlock
from megarq.data.image_shards import ImageSample
from megarq.data.manifest import CodeSettings
from megarq.data.transforms import from_pixels
from megarq.parallel.initialization import named_generator
from megarq.pretokenize.decoder import Batch, Pixels
from megarq.rqvae.codebook import exact_arithmetic
from megarq.rqvae.model import RQVAE

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_SOFT_BYTES = 2**28
"""Most memory that the soft codes behind the perplexity may take at once."""


class BlockEncoder:
    """Turns batches of pictures into blocks of codes."""

    def __init__(self, rqvae: RQVAE, settings: CodeSettings, device: torch.device) -> None:
        """rqvae: on `device`, in fp32 and in eval mode; settings: what the shards are to hold."""
        self._rqvae, self._settings, self._device = rqvae, settings, device
        dtype = PRECISIONS[settings.precision]
        encode = (rqvae if dtype == torch.float32 else deepcopy(rqvae).to(dtype)).encode
        self._network = torch.compile(encode, dynamic=False) if settings.compiled else encode

    def blocks(
        self, batches: Iterable[Batch], lost: list[str]
    ) -> Generator[tuple[CodeBlock, tuple[float, ...]], None, None]:
        """The blocks of an image shard, each with the perplexity of Q per depth for the first, () for the others.

        lost: gets the keys of samples whose latents are not finite. Their rows are left out, after all batches of the
        block, so that the others' bytes stay as they are; a block without rows is left out too.
        """
        samples: list[ImageSample] = []
        parts: list[dict[str, Tensor]] = []
        first = True
        for batch in batches:
            latents = self.encode(batch.pictures)
            parts.append(self.stacks(latents, [sample.key for sample in batch.samples]))
            if first:
                parts[-1]["perplexity"] = self._perplexity(latents)
            samples += batch.samples
            if len(samples) == self._settings.block_size:
                for block in self._finite(samples, parts, lost):
                    yield block
                    first = False
                samples, parts = [], []
        if samples:
            yield from self._finite(samples, parts, lost)

    @torch.no_grad()
    def encode(self, pictures: Pixels) -> Tensor:
        """[b, R, R, 3] -> fp32 latents [b, H, W, C], computed in a batch of the one fixed size."""
        images = from_pixels(torch.from_numpy(pictures).to(self._device))
        missing = self._settings.batch_size - len(pictures)
        with exact_arithmetic(self._device.type):
            return self._network(F.pad(images, (0, 0) * 3 + (0, missing)))[: len(pictures)].float()

    def stacks(self, latents: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
        """[b, H, W, C] -> on the device, by name: argmin codes and draws [b, H, W, D], and the latents where stored."""
        ours = self._settings
        stacks = {"codes": self._rqvae.quantize(latents)}
        for draw in range(1, ours.draws + 1):
            generators = [named_generator(ours.seed, key, draw) for key in keys]
            stacks[f"draw{draw}"] = self._rqvae.draw_hard_codes(latents, ours.temperature, generators)
        stacks["finite"] = latents.isfinite().flatten(1).all(1)
        if ours.latent_shape is not None:
            stacks["latents"] = latents.half()
            stacks["finite"] &= stacks["latents"].isfinite().flatten(1).all(1)
        return stacks

    def _finite(
        self, samples: list[ImageSample], parts: list[dict[str, Tensor]], lost: list[str]
    ) -> Iterator[tuple[CodeBlock, tuple[float, ...]]]:
        """The block of these samples and stacks, fetched from the device, and its perplexity; none without a row."""
        arrays = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
        finite = arrays["finite"]
        lost += [sample.key for sample, whole in zip(samples, finite, strict=True) if not whole]
        if not finite.any():
            return
        arrays = {name: array[finite] for name, array in arrays.items()}
        samples = [sample for sample, whole in zip(samples, finite, strict=True) if whole]
        means = arrays["perplexity"].mean(0).tolist() if "perplexity" in arrays else []
        block = CodeBlock(
            codes=arrays["codes"].astype(np.uint16),
            draws=[arrays[f"draw{draw}"].astype(np.uint16) for draw in range(1, self._settings.draws + 1)],
            latents=arrays.get("latents"),
            keys=[sample.key for sample in samples],
            captions=[sample.captions for sample in samples],
            labels=[sample.label for sample in samples],
        )
        yield block, tuple(float(f"{mean:.4g}") for mean in means)

    def _perplexity(self, latents: Tensor) -> Tensor:
        """[b, H, W, C] -> exp(entropy of Q) of each sample at each depth, averaged over its positions: [b, D] fp64."""
        height, width, depth = self._settings.code_shape
        rows = max(1, _SOFT_BYTES // (height * width * depth * max(self._settings.codebook_sizes) * 4))
        means = []
        for part in latents.split(rows):
            soft = self._rqvae.soft_codes(part, self._settings.temperature)  # [rows, H, W, D, K]
            entropy = torch.special.entr(soft).sum(-1)
            means.append(entropy.double().exp().mean((1, 2)).cpu())
        return torch.cat(means)
