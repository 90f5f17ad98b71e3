"""Batches of codes and conditions for one data-parallel rank.

Worked example: 1,797 samples of [8, 8, 4] codes, global batch B = 64 on 2 ranks, 32 caption tokens:

    order.py        samples 64b .. 64b + 63 of the endless stream; rank_share takes this rank's 32 of them
    code_shards.py  codes [32, 8, 8, 4] of draw 1 + (hash(seed, sample) + epoch) mod N; one caption of each sample
    caption_encoder caption -> 32 tokens, with dropout seeded by (seed, sample, epoch)
    CodeBatch       codes [32, 8, 8, 4] int64, cond [32, 32] int64, latents or None, .., and the state after it

Legend: b samples of this rank, H, W, D code shape, C codebook dim, L condition length.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megarq.data.batches import batches_in_order, check_share
from megarq.data.code_shards import CodeShards
from megarq.data.order import IntArray, LoaderState, SampleOrder, mix, rank_share, sample_hash
from megarq.errors import DataError

logger = logging.getLogger(__name__)

CaptionEncoder = Callable[[str, int | None], list[int]]
"""(caption, seed of its dropout or None for none) -> exactly L token ids."""


@dataclass
class CodeBatch:
    """One rank's share of a global batch."""

    codes: Tensor
    """[b, H, W, D] int64 code stacks."""
    cond: Tensor
    """[b, L] int64 caption tokens; [b, 1] classes, or zeros without a condition."""
    latents: Tensor | None
    """[b, H, W, C] float16, for exact soft targets only."""
    weights: Tensor
    """[b] float32: 1, or 0 for a sample that only fills up the last validation batch."""
    sample_ids: Tensor
    """[b] int64 number of each sample in the code folder."""
    epochs: Tensor
    """[b] int64 pass over the data that each sample belongs to; a batch may stand in two."""
    state: LoaderState
    """Where the loader stands after this batch: start there to go on."""


class SampleMaker:
    """Turns places in the code shards into tensors; every choice is a function of (seed, sample, epoch)."""

    def __init__(
        self,
        data: CodeShards,
        *,
        targets: str,
        condition: str,
        cond_length: int,
        caption_encoder: CaptionEncoder | None,
        seed: int,
    ) -> None:
        """targets: "draws", "argmin" or "soft"; condition: "text", "class" or "none".

        Raises: DataError where the shards lack what is asked for: draws, latents, captions or classes.
        """
        self._data, self._seed = data, seed
        self._targets, self._condition = targets, condition
        self._cond_length, self._caption_encoder = cond_length, caption_encoder
        _check_targets(data, targets)
        _check_condition(data, condition, cond_length, caption_encoder)

    def make(self, block: IntArray, row: IntArray, epoch: IntArray | None, state: LoaderState) -> CodeBatch:
        """[b] each -> the batch of these samples; without epochs: first choices and no caption dropout."""
        ids = self._data.sample_ids(block, row)
        hashes = sample_hash(self._seed, ids)
        epochs = (np.zeros_like(ids) if epoch is None else epoch).astype(np.uint64)
        draw = np.zeros_like(ids)
        if self._targets == "draws":
            draw = 1 + self._turn(hashes, epochs, np.uint64(self._data.settings.draws))
        latents = torch.from_numpy(self._data.read_latents(block, row)) if self._targets == "soft" else None
        return CodeBatch(
            codes=torch.from_numpy(self._data.read_codes(block, row, draw).astype(np.int64)),
            cond=self._cond(block, row, hashes, epochs, dropout=epoch is not None),
            latents=latents,
            weights=torch.ones(len(ids)),
            sample_ids=torch.from_numpy(ids),
            epochs=torch.from_numpy(epochs.astype(np.int64)),
            state=state,
        )

    @staticmethod
    def _turn(hashes: np.ndarray, epochs: np.ndarray, choices: np.uint64) -> IntArray:
        """(hash + epoch) mod choices: each sample starts anywhere and takes its choices in turn."""
        return ((hashes % choices + epochs) % choices).astype(np.int64)

    def _cond(self, block: IntArray, row: IntArray, hashes: np.ndarray, epochs: np.ndarray, *, dropout: bool) -> Tensor:
        places = list(zip(block.tolist(), row.tolist(), strict=True))
        if self._condition == "none":
            return torch.zeros(len(places), 1, dtype=torch.int64)
        if self._condition == "class":
            labels = [self._data.label(*place) for place in places]
            return torch.tensor(labels, dtype=torch.int64).unsqueeze(1)
        assert self._caption_encoder is not None
        seeds = (mix(hashes ^ mix(epochs)) >> np.uint64(1)).tolist()
        tokens = []
        for place, start, epoch, seed in zip(places, hashes.tolist(), epochs.tolist(), seeds, strict=True):
            captions = self._data.captions(*place) or [""]
            caption = captions[(start % len(captions) + epoch) % len(captions)]
            tokens.append(self._caption_encoder(caption, seed if dropout else None))
        cond = torch.tensor(tokens, dtype=torch.int64)
        assert cond.shape == (len(places), self._cond_length), f"caption_encoder gave {tuple(cond.shape)}"
        return cond


def _check_targets(data: CodeShards, targets: str) -> None:
    assert targets in ("draws", "argmin", "soft"), targets
    if targets == "draws" and data.settings.draws == 0:
        raise DataError(
            f"objective.targets=draws, but {data.folder} holds argmin codes alone. Set objective.targets=argmin, or "
            "pretokenize with --draws 8."
        )
    if targets == "soft" and data.settings.latent_shape is None:
        raise DataError(
            f"objective.targets=soft, but {data.folder} holds no latents. Pretokenize with --latents, or set "
            "objective.targets=draws."
        )


def _check_condition(data: CodeShards, condition: str, cond_length: int, encoder: CaptionEncoder | None) -> None:
    assert condition in ("text", "class", "none"), condition
    assert cond_length == 1 or condition == "text", "a class is one token"
    assert condition != "text" or encoder is not None, "captions need an encoder"
    if condition == "class" and data.labelled < data.samples:
        raise DataError(
            f"the model is conditional on classes, but {data.samples - data.labelled} of {data.samples} samples in "
            f"{data.folder} have none. Make the image shards with classes (tools/make_shards.py --class-folders)."
        )
    if condition == "text" and data.captioned == 0:
        raise DataError(
            f"the model is conditional on captions, but no sample in {data.folder} has one. Make the image shards with "
            "captions (tools/make_shards.py --captions)."
        )
    if condition == "text" and data.captioned < data.samples:
        missing = data.samples - data.captioned
        logger.warning(
            "%d of %d samples in %s have no caption: they train as empty", missing, data.samples, data.folder
        )


class CodeLoader:
    """Endless batches of one rank. Content depends on (seed, start) alone, not on ranks or workers."""

    def __init__(
        self,
        data: CodeShards,
        *,
        caption_encoder: CaptionEncoder | None,
        cond_length: int,
        condition: str,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        targets: str = "draws",
        workers: int = 0,
        start: LoaderState | None = None,
    ) -> None:
        """rank, world_size: data-parallel; workers: processes of this rank that make batches, 0 for none.

        Raises: DataError where the ranks cannot share the batch, the start is of other data, or the shards lack what
        the targets or the condition need.
        """
        check_share(global_batch_size, world_size)
        self._maker = SampleMaker(
            data,
            targets=targets,
            condition=condition,
            cond_length=cond_length,
            caption_encoder=caption_encoder,
            seed=seed,
        )
        self._order = SampleOrder(data.block_sizes, seed)
        self._batch, self._rank, self._world_size, self._workers = global_batch_size, rank, world_size, workers
        self._start = (start or LoaderState()).position(self._order.samples)

    @property
    def samples_per_epoch(self) -> int:
        """Samples in one pass over the data."""
        return self._order.samples

    def __iter__(self) -> Iterator[CodeBatch]:
        return batches_in_order(self._load, self._workers)

    def _load(self, number: int) -> CodeBatch:
        """Batch `number` after the start, for this rank."""
        first = self._start + number * self._batch
        picks = self._order.picks(first, self._batch)
        mine = rank_share(picks.lane, self._world_size, self._rank)
        state = LoaderState.at(first + self._batch, self._order.samples)
        return self._maker.make(picks.block[mine], picks.row[mine], picks.epoch[mine], state)


def validation_batches(
    data: CodeShards,
    *,
    caption_encoder: CaptionEncoder | None,
    cond_length: int,
    condition: str,
    global_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    targets: str = "draws",
) -> Iterator[CodeBatch]:
    """Every sample once, in order, the same in every call; each rank gets ceil(N / B) batches of B / world_size.

    The last global batch is filled up with samples of weight 0. Captions are encoded without dropout.
    Raises: as CodeLoader, at once.
    """
    share = check_share(global_batch_size, world_size)
    maker = SampleMaker(
        data, targets=targets, condition=condition, cond_length=cond_length, caption_encoder=caption_encoder, seed=seed
    )
    ends = np.cumsum(data.block_sizes)

    def batch_from(first: int) -> CodeBatch:
        places = first + rank * share + np.arange(share)
        inside = np.minimum(places, data.samples - 1)
        block = np.searchsorted(ends, inside, side="right")
        row = inside - (ends[block] - data.block_sizes[block])
        batch = maker.make(block, row, None, LoaderState(0, min(first + global_batch_size, data.samples)))
        batch.weights = torch.from_numpy((places < data.samples).astype(np.float32))
        return batch

    return map(batch_from, range(0, data.samples, global_batch_size))
