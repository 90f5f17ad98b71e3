"""One codebook: search, and its moving averages over the latents of all ranks (arXiv 2203.01941, section 3.1).

Nothing here is trained by gradients: the weights are the moving averages of the vectors that chose them.

Shapes: N vectors of this rank, M vectors of all ranks, K codebook size, C codebook dim.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

_INITIAL_STD = 0.02
"""Scale of untrained codes: below that of latents, so that the first step's residuals are still the latents'."""
_REPEAT_NOISE = 0.01
"""Noise that tells repeated restart latents apart, in units of their root mean square."""


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """fp32 mathematics whatever surrounds it: autocast off, and neither TF32 nor bf16 inside fp32 matrix products."""
    products = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [product.fp32_precision for product in products]
    for product in products:
        product.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for product, precision in zip(products, before, strict=True):
            product.fp32_precision = precision


@contextmanager
def exact_arithmetic(device_type: str) -> Iterator[None]:
    """Products as `full_precision` has them, and convolutions without TF32, by the same algorithm every time."""
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with full_precision(device_type), cudnn:
        yield


class Span(NamedTuple):
    """Where this rank's vectors lie among those of all ranks, counted rank after rank."""

    first: int
    """Global index of this rank's first vector."""
    total: int
    """M, the vectors of all ranks."""


def is_distributed(group: dist.ProcessGroup | None) -> bool:
    """Whether `group` (none: all ranks) has anybody else in it."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def global_span(count: int, device: torch.device, group: dist.ProcessGroup | None) -> Span:
    """The span of `count` vectors on this rank; ranks may hold different numbers of them."""
    if not is_distributed(group):
        return Span(0, count)
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([count], device=device), group=group)
    sizes = torch.cat(counts).tolist()
    return Span(sum(sizes[: dist.get_rank(group)]), sum(sizes))


class Codebook(nn.Module):
    """K vectors and their moving averages, as buffers in fp32 that stay so when a model is cast to bf16.

    `weight` has K + 1 rows: the last is the released checkpoints' padding row, which no search returns.
    """

    weight: Tensor
    cluster_size_ema: Tensor
    embed_ema: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        decay: float = 0.99,
        eps: float = 1e-5,
        restart_unused: bool = True,
        generator: torch.Generator | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """A small random codebook, the same on every rank for the same CPU `generator`.

        With restarts its codes start with no latents to their name, so the first training step gives all but the
        busiest of them a latent of the batch; without, each counts as one latent, so that an unused code stays.
        """
        super().__init__()
        self.size, self.dim = size, dim
        self.decay, self.eps = decay, eps
        self.restart_unused = restart_unused
        self.process_group = process_group
        self.register_buffer("weight", torch.zeros(size + 1, dim))
        self.register_buffer("cluster_size_ema", torch.full((size,), 0.0 if restart_unused else 1.0))
        self.register_buffer("embed_ema", torch.zeros(size, dim))
        if not self.weight.is_meta:
            start = torch.randn(size, dim, generator=generator, device="cpu") * _INITIAL_STD
            self.weight[:-1] = start
            self.embed_ema.copy_(self.weight[:-1] * self.cluster_size_ema.unsqueeze(1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Codebook":
        """Follow the model to another device, but not to another precision: an average of bf16 steps stands still."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    @property
    def vectors(self) -> Tensor:
        """The codes' vectors [K, C], without the padding row."""
        return self.weight[:-1].float()

    def distances(self, vectors: Tensor, some: slice = slice(None)) -> Tensor:
        """|v - e(k)|^2 for all k, [..., C] -> [..., K], as |v|^2 + |e(k)|^2 - 2 v.e(k) rounded in this order.

        `some` asks for a slice of the codes alone, which may reach beyond the last of them.
        The released models' codes were searched with the same sum, so that nearly equal codes fall the same way.
        Call under `full_precision`, with fp32 vectors.
        """
        codes, flat = self.vectors[some], vectors.reshape(-1, self.dim)
        norms = flat.square().sum(1, keepdim=True) + codes.square().sum(1)
        return torch.addmm(norms, flat, codes.t(), alpha=-2.0).reshape(*vectors.shape[:-1], len(codes))

    def nearest(self, vectors: Tensor) -> Tensor:
        """Codes [...] of the nearest codebook vectors to [..., C]; the first of equals."""
        return self.distances(vectors).argmin(-1)

    def embed(self, codes: Tensor) -> Tensor:
        """Vectors of codes, [...] -> [..., C]."""
        return F.embedding(codes, self.weight.float())

    @torch.no_grad()
    def update(self, vectors: Tensor, codes: Tensor, span: Span, generator: torch.Generator) -> None:
        """Move the codebook towards the vectors [N, C] that chose `codes` [N] (van den Oord et al., 2017, appendix A).

        Counts and sums are over all ranks. Codes whose moving count is below 1 restart from vectors that `generator`,
        in the same state on every rank, picks by their global index. Collective: every rank must call it.
        """
        totals = self.totals(vectors, codes)
        self.embed_ema.lerp_(totals[:, :-1], 1 - self.decay)
        self.cluster_size_ema.lerp_(totals[:, -1], 1 - self.decay)
        if self.restart_unused:
            unused = (self.cluster_size_ema < 1).nonzero().squeeze(1)
            if len(unused):
                self.embed_ema[unused] = self.random_vectors(vectors, len(unused), span, generator)
                self.cluster_size_ema[unused] = 1.0
        total = self.cluster_size_ema.sum()
        smoothed = (self.cluster_size_ema + self.eps) / (total + self.size * self.eps) * total
        self.weight[:-1] = self.embed_ema / smoothed.unsqueeze(1)

    def totals(self, vectors: Tensor, codes: Tensor) -> Tensor:
        """Sums of the vectors [N, C] of all ranks that chose each code, and in a last column their counts: [K, C + 1].

        Collective.
        """
        ones = vectors.new_ones(len(vectors), 1)
        totals = vectors.new_zeros(self.size, self.dim + 1).index_add_(0, codes, torch.cat([vectors, ones], dim=1))
        self._all_reduce(totals)
        return totals

    def random_vectors(self, vectors: Tensor, count: int, span: Span, generator: torch.Generator) -> Tensor:
        """`count` different vectors of all ranks [count, C]; repeated with a little noise where there are fewer.

        Collective; `generator` is in the same state on every rank.
        """
        order = torch.randperm(span.total, generator=generator, device="cpu").to(vectors.device)
        picked = order.repeat(-(-count // span.total))[:count] - span.first  # counted from this rank's first
        mine = (picked >= 0) & (picked < len(vectors))
        rows = vectors.new_zeros(count, self.dim)
        rows[mine] = vectors[picked[mine]]
        self._all_reduce(rows)  # one rank has the vector, the others zeros: exact
        if count > span.total:
            noise = torch.randn(count - span.total, self.dim, generator=generator, device="cpu").to(rows.device)
            rows[span.total :] += _REPEAT_NOISE * rows.square().mean().sqrt() * noise
        return rows

    def _all_reduce(self, tensor: Tensor) -> None:
        if is_distributed(self.process_group):
            dist.all_reduce(tensor, group=self.process_group)
