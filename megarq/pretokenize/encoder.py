"""Pictures through a frozen RQ-VAE, so that a sample's bytes depend on its block alone.

A block of up to 1,024 samples is encoded in batches of one fixed size, the last one filled up with zeros, and no batch
crosses a block. Arithmetic is fp32 without TF32. A drawn stack comes from a generator of (seed, sample key, draw).

Shapes: b batch, n block, R resolution, H, W, D code shape, K codebook size, C codebook dim.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megarq.data.code_writer import CodeBlock
from megarq.data.image_shards import BadSamples, ImageSample, read_samples
from megarq.data.manifest import CodeSettings
from megarq.data.transforms import transform_image
from megarq.errors import DataError
from megarq.parallel.initialization import derived_seed
from megarq.rqvae.codebook import full_precision
from megarq.rqvae.model import RQVAE

_SOFT_BYTES = 2**28
"""Most memory that the soft codes behind the perplexity may take at once."""


class BlockEncoder:
    """Turns one image shard into blocks of codes."""

    def __init__(self, rqvae: RQVAE, settings: CodeSettings, device: torch.device) -> None:
        """rqvae: on `device`, in eval mode; settings: what the shards are to hold."""
        self._rqvae, self._settings, self._device = rqvae, settings, device

    def blocks(self, source: str, bad: BadSamples) -> Iterator[tuple[CodeBlock, tuple[float, ...]]]:
        """The blocks of an image shard, each with the perplexity of Q per depth for the first, () for the others.

        Raises: DataError for a missing or torn shard, or too many bad samples.
        """
        pictures = self._pictures(source, bad)
        first = True
        while pending := list(islice(pictures, self._settings.batch_size)):
            yield self._block(pending, pictures, measure=first)
            first = False

    def _pictures(self, source: str, bad: BadSamples) -> Iterator[tuple[ImageSample, Tensor]]:
        """The readable samples of a shard, each with its picture [3, R, R]."""
        ours = self._settings
        for sample in read_samples(source, bad):
            try:
                seed = derived_seed(ours.seed, sample.key)
                picture = transform_image(sample.image, ours.transform, ours.resolution, seed)
            except DataError as error:
                bad.skip(source, sample.key, str(error))
                continue
            yield sample, picture

    def _block(
        self,
        batch: list[tuple[ImageSample, Tensor]],
        pictures: Iterator[tuple[ImageSample, Tensor]],
        *,
        measure: bool,
    ) -> tuple[CodeBlock, tuple[float, ...]]:
        """The block that begins with `batch` and goes on with `pictures`."""
        samples: list[ImageSample] = []
        parts: dict[str, list[npt.NDArray[Any]]] = {}
        perplexities = []
        while batch:
            samples.extend(sample for sample, _ in batch)
            latents = self._encode(torch.stack([picture for _, picture in batch]))
            for name, array in self._stacks(latents, [sample.key for sample, _ in batch]).items():
                parts.setdefault(name, []).append(array)
            if measure:
                perplexities.append(self._perplexity(latents))
            room = self._settings.block_size - len(samples)
            batch = list(islice(pictures, min(room, self._settings.batch_size)))
        arrays = {name: np.concatenate(part) for name, part in parts.items()}
        block = CodeBlock(
            codes=arrays["codes"],
            draws=[arrays[f"draw{draw}"] for draw in range(1, self._settings.draws + 1)],
            latents=arrays.get("latents"),
            keys=[sample.key for sample in samples],
            captions=[sample.captions for sample in samples],
            labels=[sample.label for sample in samples],
        )
        means = torch.cat(perplexities).mean(0).tolist() if measure else []
        return block, tuple(float(f"{mean:.4g}") for mean in means)

    @torch.no_grad()
    def _encode(self, pictures: Tensor) -> Tensor:
        """[b, 3, R, R] -> latents [b, H, W, C], computed in a batch of the one fixed size."""
        size = self._settings.batch_size
        batch = torch.zeros(size, *pictures.shape[1:])
        batch[: len(pictures)] = pictures
        with _exact(self._device.type):
            return self._rqvae.encode(batch.to(self._device))[: len(pictures)].float()

    def _stacks(self, latents: Tensor, keys: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """[b, H, W, C] -> argmin codes and draws, uint16 [b, H, W, D], and fp16 latents where they are stored."""
        ours = self._settings
        stacks = {"codes": self._rqvae.quantize(latents)}
        for draw in range(1, ours.draws + 1):
            generators = [torch.Generator().manual_seed(derived_seed(ours.seed, key, draw)) for key in keys]
            stacks[f"draw{draw}"] = self._rqvae.draw_hard_codes(latents, ours.temperature, generators)
        arrays: dict[str, npt.NDArray[Any]] = {
            name: codes.cpu().numpy().astype(np.uint16) for name, codes in stacks.items()
        }
        if ours.latent_shape is not None:
            arrays["latents"] = latents.half().cpu().numpy()
        return arrays

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


@contextmanager
def _exact(device_type: str) -> Iterator[None]:
    """fp32 without TF32 in products and convolutions, by the same algorithm every time."""
    with ExitStack() as stack:
        stack.enter_context(full_precision(device_type))
        stack.enter_context(
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        )
        yield
