"""Residual quantization: a latent as a stack of D codes whose vectors add up to it (arXiv 2203.01941, section 3.1).

    r_0 = z;   k_d = argmin_k |r_{d-1} - e(k)|^2;   r_d = r_{d-1} - e(k_d);   z is replaced by sum_d e(k_d)

All of it is fp32, whatever the precision of the latents and of the rest of the model.

Shapes: B batch, H and W of the code stack, D depth, K codebook size (of the largest codebook), C codebook dim.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megarq.errors import ConfigError
from megarq.parallel.initialization import named_generator
from megarq.rqvae.codebook import Codebook, full_precision, global_span

Generators = torch.Generator | Sequence[torch.Generator]
"""One generator for a batch, or one for each of its samples, whose draws then depend on no other sample."""


class Quantized(NamedTuple):
    """What the decoder and the losses need of a quantized batch."""

    latents: Tensor
    """Quantized latents [B, H, W, C], in the dtype of the latents given; gradients pass straight through."""
    commitment_loss: Tensor
    """Mean over d of mean((z - sg(sum_{i<=d} e(k_i)))^2), an fp32 scalar."""
    codes: Tensor
    """The argmin stack [B, H, W, D], int64."""


class ResidualQuantizer(nn.Module):
    """D codes for each latent, from one codebook shared by all depths or from one for each."""

    steps: Tensor

    def __init__(
        self,
        sizes: Sequence[int],
        dim: int,
        shared: bool = True,
        decay: float = 0.99,
        restart_unused: bool = True,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """`sizes` are the codebook sizes of the depths (equal when shared); `seed` decides first codes and restarts.

        `process_group` (none: all ranks, where there are several) shares the training batch.
        """
        super().__init__()
        assert not shared or len(set(sizes)) == 1, "a shared codebook has one size"
        self.sizes = tuple(sizes)
        self.depth, self.dim, self.shared = len(sizes), dim, shared
        self.seed = seed
        self.process_group = process_group
        self.codebooks = nn.ModuleList(
            Codebook(
                size,
                dim,
                decay=decay,
                restart_unused=restart_unused,
                generator=named_generator(seed, "codebook", index),
                process_group=process_group,
            )
            for index, size in enumerate(self.sizes[:1] if shared else self.sizes)
        )
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def codebook(self, depth: int) -> Codebook:
        """The codebook that depth `depth`, counted from 0, draws from."""
        book = self.codebooks[0 if self.shared else depth]
        assert isinstance(book, Codebook)
        return book

    def quantize(self, latents: Tensor) -> Tensor:
        """The argmin stacks, [B, H, W, C] -> int64 [B, H, W, D]."""
        return self._stack(latents, lambda depth, residual: self.codebook(depth).nearest(residual))

    def soft_codes(self, latents: Tensor, temperature: float) -> Tensor:
        """Q(k | r_{d-1}) after the argmin codes of the depths before, [B, H, W, C] -> fp32 [B, H, W, D, K].

        A depth with a smaller codebook has probability 0 beyond it. Source: arXiv 2203.01941, section 3.2.3.
        """
        soft: list[Tensor] = []

        def choose(depth: int, residual: Tensor) -> Tensor:
            distances = self.codebook(depth).distances(residual)
            soft.append(self._soft(depth, distances, temperature))
            return distances.argmin(-1)  # not the largest of `soft`: rounding makes equals of near codes there

        self._stack(latents, choose)
        return torch.stack(soft, dim=-2)

    def draw_codes(self, latents: Tensor, temperature: float, generator: Generators) -> tuple[Tensor, Tensor]:
        """Stochastic codes, int64 [B, H, W, D], and the Q each was drawn from, fp32 [B, H, W, D, K].

        A depth's residual is what the codes *drawn* before it leave. The same generators give the same codes.
        """
        soft: list[Tensor] = []
        codes = self._draw(latents, temperature, generator, soft.append)
        return codes, torch.stack(soft, dim=-2)

    def draw_hard_codes(self, latents: Tensor, temperature: float, generator: Generators) -> Tensor:
        """The codes of `draw_codes` alone, without ever holding the Q of more than one depth."""
        return self._draw(latents, temperature, generator, lambda soft: None)

    def embed(self, codes: Tensor) -> Tensor:
        """Codebook vectors of code stacks, [..., D] -> fp32 [..., D, C]."""
        return torch.stack([self.codebook(depth).embed(codes[..., depth]) for depth in range(self.depth)], dim=-2)

    def forward(self, latents: Tensor) -> Quantized:
        """Quantize latents [B, H, W, C], straight-through; in training, update the codebooks as well.

        A depth is quantized with the codebook as the depth before left it, then updates it. Collective in training:
        every rank of the process group must call it, and must not recompute it in the backward pass.
        """
        with full_precision(latents.device.type):
            z = latents.float()
            residual = z.detach()
            total = torch.zeros_like(residual)
            codes, losses = [], []
            if self.training:
                step = int(self.steps)
                span = global_span(residual[..., 0].numel(), z.device, self.process_group)
            for depth in range(self.depth):
                book = self.codebook(depth)
                chosen = book.nearest(residual)
                embedded = book.embed(chosen)
                if self.training:
                    generator = named_generator(self.seed, "restart", step, depth)
                    book.update(residual.reshape(-1, self.dim), chosen.reshape(-1), span, generator)
                residual = residual - embedded
                total = total + embedded
                codes.append(chosen)
                losses.append((z - total).square().mean())
            if self.training:
                self.steps += 1
            quantized = (z + (total - z).detach()).to(latents.dtype)
            return Quantized(quantized, torch.stack(losses).mean(), torch.stack(codes, dim=-1))

    @torch.no_grad()
    def _stack(self, latents: Tensor, choose: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Codes [B, H, W, D] that `choose` picks for each depth, given the residuals [B, H, W, C] before it."""
        with full_precision(latents.device.type):
            residual = latents.float()
            codes = []
            for depth in range(self.depth):
                codes.append(choose(depth, residual))
                residual = residual - self.codebook(depth).embed(codes[-1])
            return torch.stack(codes, dim=-1)

    def _soft(self, depth: int, distances: Tensor, temperature: float) -> Tensor:
        """Q of one depth [..., K] = softmax(-distances / temperature), zero beyond its own codebook."""
        if temperature <= 0:
            raise ConfigError(f"temperature={temperature} for soft codes: use a temperature above 0, such as 0.5.")
        soft = torch.softmax(distances / -temperature, dim=-1)
        return F.pad(soft, (0, max(self.sizes) - self.sizes[depth]))

    def _draw(
        self, latents: Tensor, temperature: float, generator: Generators, keep: Callable[[Tensor], object]
    ) -> Tensor:
        uniform = _uniform((*latents.shape[:-1], self.depth), generator).to(latents.device)

        def choose(depth: int, residual: Tensor) -> Tensor:
            soft = self._soft(depth, self.codebook(depth).distances(residual), temperature)
            keep(soft)
            return _inverse_cdf(soft, uniform[..., depth]).clamp_(max=self.sizes[depth] - 1)

        return self._stack(latents, choose)


def _uniform(shape: tuple[int, ...], generator: Generators) -> Tensor:
    """fp64 numbers in [0, 1) of `shape` [B, ...], on the generators' device."""
    if isinstance(generator, torch.Generator):
        return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
    assert len(generator) == shape[0], "one generator for each sample"
    return torch.stack([_uniform(shape[1:], one) for one in generator])


def _inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The codes [...] where the cumulated probabilities [..., K] first exceed `uniform` [...] of their total.

    One random number for each draw, where Gumbel noise would take K. In fp64: with many codes, each is a small step.
    """
    cumulated = probabilities.double().cumsum(-1)
    return torch.searchsorted(cumulated, uniform.unsqueeze(-1) * cumulated[..., -1:], right=True).squeeze(-1)
