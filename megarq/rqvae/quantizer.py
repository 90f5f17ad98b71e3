"""Residual quantization: a latent as a stack of D codes whose vectors add up to it (arXiv 2203.01941, section 3.1).

    r_0 = z;   k_d = argmin_k |r_{d-1} - e(k)|^2;   r_d = r_{d-1} - e(k_d);   z is replaced by sum_d e(k_d)

All of it is fp32, whatever the precision of the latents and of the rest of the model.

Stochastic codes are drawn from Q(k | r_{d-1}) = softmax_k(-|r_{d-1} - e(k)|^2 / temperature) in place of the argmin.
A tensor group shares that work. Rank p looks at codes p K/P to (p+1) K/P alone and tells the others three numbers of
each depth of a latent: the distance to its nearest code, the mass of its slice, how many of its codes the draw passes.

Shapes: B batch, H and W of the code stack, D depth, K codebook size (of the largest codebook), C codebook dim,
P tensor-parallel size, N = B H W latents, n of them in a chunk.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megarq.errors import ConfigError
from megarq.parallel.collectives import gather_from, reduce_from
from megarq.parallel.initialization import named_generator
from megarq.parallel.topology import ALONE, TensorGroup
from megarq.rqvae.codebook import Codebook, full_precision, global_span

Generators = torch.Generator | Sequence[torch.Generator]
"""One generator for a batch, or one for each of its samples, whose draws then depend on no other sample."""


CHUNK = 2**24
"""Distances of one depth that are looked at together, at most: in the fp64 of a draw's sums they are 128 MiB."""


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
        return self._stack(latents, lambda rows, depth, residual: self.codebook(depth).nearest(residual))

    def soft_codes(self, latents: Tensor, temperature: float) -> Tensor:
        """Q(k | r_{d-1}) after the argmin codes of the depths before, [B, H, W, C] -> fp32 [B, H, W, D, K].

        A depth with a smaller codebook has probability 0 beyond it. Source: arXiv 2203.01941, section 3.2.3.
        """
        _check_temperature(temperature)
        soft = self._empty_soft(latents, ALONE)

        def choose(rows: slice, depth: int, residual: Tensor) -> Tensor:
            distances = self._distances(depth, residual, ALONE)
            soft[rows, depth] = torch.softmax(distances / -temperature, dim=-1)
            return distances.argmin(-1)  # not the largest of `soft`: rounding makes equals of near codes there

        self._stack(latents, choose)
        return soft.unflatten(0, latents.shape[:-1])

    def draw_codes(
        self, latents: Tensor, temperature: float, generator: Generators, tp: TensorGroup = ALONE
    ) -> tuple[Tensor, Tensor]:
        """Stochastic codes, int64 [B, H, W, D], and this rank's slice of the Q each was drawn from, [B, H, W, D, K/P].

        A depth's residual is what the codes *drawn* before it leave. The same generators give the same codes, on every
        rank and (but where fp64 sums that differ in their last bit enclose the uniform number) for every P. Collective:
        all ranks of `tp` must call it, with the same latents and generators.
        """
        soft = self._empty_soft(latents, tp)
        return self._draw(latents, temperature, generator, tp, soft), soft.unflatten(0, latents.shape[:-1])

    def draw_hard_codes(
        self, latents: Tensor, temperature: float, generator: Generators, tp: TensorGroup = ALONE
    ) -> Tensor:
        """The codes of `draw_codes` alone, without ever holding the Q of more than a chunk of one depth."""
        return self._draw(latents, temperature, generator, tp, None)

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
    def _stack(self, latents: Tensor, choose: Callable[[slice, int, Tensor], Tensor]) -> Tensor:
        """Codes [B, H, W, D] that `choose` picks at each depth for a chunk of the latents, given its residuals [n, C].

        The chunks do not depend on P: whatever it is, the matrix products have the same rows.
        """
        with full_precision(latents.device.type):
            flat = latents.float().flatten(0, -2)
            codes = torch.empty(len(flat), self.depth, dtype=torch.int64, device=flat.device)
            step = max(1, CHUNK // max(self.sizes))
            for first in range(0, len(flat), step):
                rows = slice(first, first + step)
                residual = flat[rows]
                for depth in range(self.depth):
                    codes[rows, depth] = choose(rows, depth, residual)
                    residual = residual - self.codebook(depth).embed(codes[rows, depth])
            return codes.unflatten(0, latents.shape[:-1])

    def _distances(self, depth: int, residual: Tensor, tp: TensorGroup) -> Tensor:
        """Distances [n, K/P] to this rank's slice of the codes; those that the depth lacks are infinitely far."""
        width = self._width(tp)
        distances = self.codebook(depth).distances(residual, slice(tp.rank * width, (tp.rank + 1) * width))
        return F.pad(distances, (0, width - distances.shape[-1]), value=torch.inf)

    def _width(self, tp: TensorGroup) -> int:
        assert max(self.sizes) % tp.size == 0, "the vocabulary layers refuse such a layout"
        return max(self.sizes) // tp.size

    def _empty_soft(self, latents: Tensor, tp: TensorGroup) -> Tensor:
        """Room for Q, fp32 [N, D, K/P]."""
        shape = latents[..., 0].numel(), self.depth, self._width(tp)
        return torch.empty(shape, dtype=torch.float32, device=latents.device)

    def _draw(
        self, latents: Tensor, temperature: float, generator: Generators, tp: TensorGroup, soft: Tensor | None
    ) -> Tensor:
        """Codes by inverse CDF of uniform numbers u: how many codes have a cumulated mass of at most u of the whole.

        A rank counts them in its slice, and the code is the sum of the counts. A mass is Q before it is divided by the
        sum of all; sums are fp64, since among many codes each is a small step. `soft` takes this rank's Q.
        """
        _check_temperature(temperature)
        uniform = _uniform((*latents.shape[:-1], self.depth), generator).to(latents.device).flatten(0, -2)

        def choose(rows: slice, depth: int, residual: Tensor) -> Tensor:
            distances = self._distances(depth, residual, tp)
            nearest = gather_from(distances.amin(-1, keepdim=True), tp).amin(-1, keepdim=True)
            masses = distances.sub_(nearest).div_(-temperature).exp_()
            cumulated = masses.cumsum(-1, dtype=torch.float64)
            ends = gather_from(cumulated[:, -1:], tp).cumsum(-1)  # [n, P]: the mass of all slices up to each
            if soft is not None:
                soft[rows, depth] = masses.div_(ends[:, -1:].float())
            cumulated += F.pad(ends, (1, 0))[:, tp.rank, None]
            passed = torch.searchsorted(cumulated, uniform[rows, depth, None] * ends[:, -1:], right=True)
            return reduce_from(passed, tp).squeeze(-1).clamp_(max=self.sizes[depth] - 1)

        return self._stack(latents, choose)


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ConfigError(f"temperature={temperature} for soft codes: use a temperature above 0, such as 0.5.")


def _uniform(shape: tuple[int, ...], generator: Generators) -> Tensor:
    """fp64 numbers in [0, 1) of `shape` [B, ...], on the generators' device."""
    if isinstance(generator, torch.Generator):
        return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
    assert len(generator) == shape[0], "one generator for each sample"
    return torch.stack([_uniform(shape[1:], one) for one in generator])
