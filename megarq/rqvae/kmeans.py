"""Codebooks that start as residual k-means of latents, shared by the data-parallel ranks.

    latents of the first batches --gather_sample--> sample [S, C], the same on all ranks --start_codebooks--> codebooks

A start: depth after depth, codes are latents' residuals after the depths before, drawn at random; a shared codebook
takes an equal part of its codes from each depth. Lloyd's iterations then move all codes to the means of the residuals
that choose them, at any depth. Each rank looks at its own part of the sample, and sums are over all.

Shapes: S latents in the sample, N of them on this rank, K codebook size, C codebook dim, D depth, [b, H, W, C] latents
of this rank's part of a batch.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megarq.parallel.initialization import named_generator
from megarq.rqvae.codebook import Codebook, Span, full_precision, is_distributed
from megarq.rqvae.quantizer import CHUNK, ResidualQuantizer

_HEAD_START = 2.0
"""Least moving count of a code at the start: it restarts below 1, so an unused one has some 70 updates to be found."""


def gather_sample(latents: Sequence[Tensor], most: int, seed: int, group: dist.ProcessGroup | None) -> Tensor:
    """At most `most` of the latents of some batches, [S, C] in fp32, chosen and ordered by the seed alone (collective).

    Each batch's parts [b, H, W, C] must be its samples in order, rank after rank, and of one size.
    """
    rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if is_distributed(group) else (0, 1)
    flat = torch.stack([part.float().flatten(0, -2) for part in latents])  # [batches, N, C]
    batches, mine, dim = flat.shape
    order = torch.randperm(batches * ranks * mine, generator=named_generator(seed, "sample"))[:most]
    batch, place = order // (ranks * mine), order % (ranks * mine) - rank * mine
    here = (place >= 0) & (place < mine)
    sample = flat.new_zeros(len(order), dim)
    sample[here.to(flat.device)] = flat[batch[here].to(flat.device), place[here].to(flat.device)]
    if ranks > 1:
        dist.all_reduce(sample, group=group)  # one rank has the latent, the others zeros: exact
    return sample


@torch.no_grad()
def start_codebooks(quantizer: ResidualQuantizer, sample: Tensor, iterations: int, batch: int) -> None:
    """Replace the codebooks by k-means of `sample` [S, C], the same on all ranks (collective).

    Args:
        quantizer: its seed decides the draws, its process group shares the work.
        sample: from `gather_sample`.
        iterations: of Lloyd's algorithm.
        batch: latents, over all ranks, of one training pass: the moving counts start as it would leave them.
    """
    vectors, span = _own_part(sample, quantizer.process_group)
    with full_precision(sample.device.type):
        _draw_codes(quantizer, vectors, span)
        for iteration in range(iterations):
            _lloyd(quantizer, vectors, span, iteration)
        totals, _ = _totals(quantizer, vectors)
    for book, total in totals.items():
        depths = quantizer.depth if quantizer.shared else 1
        book.cluster_size_ema.copy_((total[:, -1] * (batch / (len(sample) * depths))).clamp(min=_HEAD_START))
        book.embed_ema.copy_(book.weight[:-1] * book.cluster_size_ema.unsqueeze(1))


def _own_part(sample: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Span]:
    """This rank's part [N, C] of the sample, and where it lies."""
    if not is_distributed(group):
        return sample, Span(0, len(sample))
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    first, end = (len(sample) * place // ranks for place in (rank, rank + 1))
    return sample[first:end], Span(first, len(sample))


def _draw_codes(quantizer: ResidualQuantizer, vectors: Tensor, span: Span) -> None:
    """Let codes be residuals; each depth's residuals are those left by the codes drawn so far."""
    for depth in range(quantizer.depth):
        book, first, end = quantizer.codebook(depth), 0, quantizer.sizes[depth]
        if quantizer.shared:
            first, end = (-(-book.size * place // quantizer.depth) for place in (depth, depth + 1))
        generator = named_generator(quantizer.seed, "kmeans", depth)
        book.weight[first:end] = book.random_vectors(vectors, end - first, span, generator)
        vectors = vectors - book.embed(_nearest(book, vectors, end))


def _lloyd(quantizer: ResidualQuantizer, vectors: Tensor, span: Span, iteration: int) -> None:
    """Move each code to the mean of the residuals that choose it; one that none chooses to a residual at random."""
    totals, residuals = _totals(quantizer, vectors)
    for index, (book, total) in enumerate(totals.items()):
        book.weight[:-1] = total[:, :-1] / total[:, -1:].clamp(min=1)
        unused = (total[:, -1] == 0).nonzero().squeeze(1)
        depth = iteration % quantizer.depth if quantizer.shared else index
        generator = named_generator(quantizer.seed, "kmeans", iteration, depth)
        if len(unused):
            book.weight[unused] = book.random_vectors(residuals[depth], len(unused), span, generator)


def _totals(quantizer: ResidualQuantizer, vectors: Tensor) -> tuple[dict[Codebook, Tensor], list[Tensor]]:
    """Sums and counts [K, C + 1] of the residuals that choose the codes of each codebook; residuals [N, C] by depth."""
    totals: dict[Codebook, Tensor] = {}
    residuals = [vectors]
    for depth in range(quantizer.depth):
        book = quantizer.codebook(depth)
        chosen = _nearest(book, residuals[-1], book.size)
        found = book.totals(residuals[-1], chosen)
        totals[book] = totals[book] + found if book in totals else found
        residuals.append(residuals[-1] - book.embed(chosen))
    return totals, residuals


def _nearest(book: Codebook, vectors: Tensor, end: int) -> Tensor:
    """The nearest of the first `end` codes to each of the vectors [N, C], without ever holding all distances."""
    rows = vectors.split(max(1, CHUNK // book.size))
    return torch.cat([book.distances(part, slice(end)).argmin(-1) for part in rows])
