"""Batches of codes and conditions for one data-parallel rank.

Worked example: 1,797 samples of [8, 8, 4] codes, global batch B = 64 on 2 ranks, 2 workers each, 32 caption tokens:

    mixture.py      samples 64b .. 64b + 63 of the endless stream; rank_share takes this rank's 32 of them
    worker w of W   of these, those of lanes with (lane // ranks) % W = w: no byte is read by two workers
    windows.py      codes [n, 8, 8, 4] of draw 1 + (hash(seed, block) + epoch) mod N; one caption of each sample
    SampleMaker     a share of the captions made empty, by (seed, sample, epoch)
    caption_encoder caption -> 32 tokens, with dropout seeded by (seed, sample, epoch)
    CodeBatch       codes [32, 8, 8, 4] int64, cond [32, 32] int64, latents or None, .., and the state after it

Where a block cannot be read any more (lost.py), other samples stand in for its own in training, and in validation they
weigh nothing.

A draw is chosen by block, so that a window is one read of that draw's bytes. The samples of a block were drawn
independently of each other, so which draw they take together says nothing about their codes.

Legend: b samples of this rank, n of one worker, H, W, D code shape, C codebook dim, L condition length.
"""

import logging
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megarq.data.batches import batches_in_order, check_share
from megarq.data.code_shards import CodeShards
from megarq.data.lost import LostBlocks, stand_ins
from megarq.data.mixture import Mixture
from megarq.data.order import IntArray, LoaderState, Picks, hash_array, mix, rank_share, sample_hash
from megarq.data.windows import LaneWindows, Rows
from megarq.errors import DataError, StorageError

logger = logging.getLogger(__name__)

MOST_STAND_INS = 32

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
    """[b] int64 number of each sample, counted through the code folders."""
    epochs: Tensor
    """[b] int64 pass over its folder that each sample belongs to; a batch may stand in two."""
    state: LoaderState
    """Where the loader stands after this batch: start there to go on."""
    lost: int = 0
    """Samples that could not be read: others stand in for them, or they have no weight."""
    news: list[str] = field(default_factory=list)
    """What could not be read any more from this batch on."""


@dataclass
class Part:
    """What one worker makes of a batch; numbers are widened in the process that trains."""

    places: Tensor
    """[n] int64 places among the rank's b samples."""
    codes: Tensor
    """[n, H, W, D] uint16."""
    cond: Tensor
    """[n, L] int64."""
    latents: Tensor | None
    """[n, H, W, C] float16."""
    sample_ids: Tensor
    """[n] int64."""
    epochs: Tensor
    """[n] int64."""
    lost: Tensor
    """[n] bool."""
    news: list[str]


class SampleMaker:
    """Turns places in the code shards into tensors; every choice is a function of (seed, sample or block, epoch)."""

    def __init__(
        self,
        data: Mixture,
        *,
        targets: str,
        condition: str,
        cond_length: int,
        caption_encoder: CaptionEncoder | None,
        caption_dropout: float = 0.0,
        seed: int,
        lost: LostBlocks | None = None,
    ) -> None:
        """targets: "draws", "argmin" or "soft"; condition: "text", "class" or "none".

        caption_dropout: share of captions that are read as empty, where `make` is asked for it.

        lost: which blocks cannot be read any more, as far as is known.

        Raises: DataError where the shards lack what is asked for: draws, latents, captions or classes.
        """
        self._data, self._seed = data, seed
        self._targets, self._condition = targets, condition
        self._cond_length, self._caption_encoder = cond_length, caption_encoder
        self._caption_dropout = caption_dropout
        self._lost = lost or LostBlocks(len(data.block_sizes))
        for folder in data.folders:
            _check_targets(folder, targets)
            _check_condition(folder, condition, cond_length, caption_encoder)
        self._first_draw = hash_array(data.block_numbers, seed) % np.maximum(data.draws, 1).astype(np.uint64)
        self.text_type: npt.DTypeLike = object if condition == "text" else np.int64
        """Of what `read` says of a sample besides its codes: a caption or a class."""

    def read(self, block: int, first: int, epoch: int, codes: Rows, text: Rows) -> None:
        """Fill codes [n, H, W, D] and text [n] with rows first .. first + n - 1 of a block in an epoch.

        What is left in them where the block is lost has no meaning, but is valid.
        """
        if self._lost.mask[block] or self._lost.read(lambda: self._read(block, first, epoch, codes, text)) is None:
            codes[:], text[:] = 0, "" if self._condition == "text" else 0

    def _read(self, block: int, first: int, epoch: int, codes: Rows, text: Rows) -> Literal[True]:
        draw = 0
        if self._targets == "draws":
            draw = 1 + (int(self._first_draw[block]) + epoch) % int(self._data.draws[block])
        self._data.read_run(block, first, draw, codes)
        if self._condition == "class":
            text[:] = self._data.text_run("labels", block, first, len(text))
        elif self._condition == "text":
            rows = first + np.arange(len(text))
            hashes = sample_hash(self._seed, self._data.sample_ids(np.full_like(rows, block), rows)).tolist()
            captions = zip(self._data.text_run("captions", block, first, len(text)), hashes, strict=True)
            text[:] = [turns[(start + epoch) % len(turns)] if turns else "" for turns, start in captions]
        return True

    def make(self, picks: Picks, codes: Rows, text: Rows, places: IntArray, *, training: bool = True) -> Part:
        """The tensors of samples that were read as codes [n, H, W, D] and text [n].

        In training others stand in for those that are lost; otherwise captions are whole. Raises: StorageError where no
        stand-in can be read.
        """
        picks, latents, lost = self._complete(picks, codes, text, training)
        ids = self._data.sample_ids(picks.block, picks.row)
        seeds = None
        if self._condition == "text" and training:
            hashes = mix(sample_hash(self._seed, ids) ^ mix(picks.epoch.astype(np.uint64)))
            seeds = (hashes >> np.uint64(1)).tolist()
            numbers = (mix(hashes) >> np.uint64(11)) * 2.0**-53  # [n] from 0 to 1
            text = np.where(numbers < self._caption_dropout, "", text)
        news, self._lost.news = self._lost.news, []
        return Part(
            torch.from_numpy(places),
            torch.from_numpy(codes),
            self._cond(text, seeds),
            None if latents is None else torch.from_numpy(latents),
            torch.from_numpy(ids),
            torch.from_numpy(picks.epoch),
            torch.from_numpy(lost),
            news,
        )

    def _complete(
        self, picks: Picks, codes: Rows, text: Rows, replace_lost: bool
    ) -> tuple[Picks, npt.NDArray[np.float16] | None, npt.NDArray[np.bool_]]:
        """(samples, latents [n, H, W, C] of soft targets, which were lost [n]); stand-ins fill codes and text."""
        soft = self._targets == "soft"
        latents = np.zeros((len(codes), *(self._data.settings.latent_shape or ())), "<f2") if soft else None
        lost_at_first = self._lost.mask[picks.block]
        for attempt in range(MOST_STAND_INS):
            lost = self._lost.mask[picks.block]
            lost_at_first |= lost
            if replace_lost and lost.any():
                picks = self._with_stand_ins(picks, lost, attempt, codes, text)
            elif latents is None or self._fill_latents(picks, ~lost, latents):
                return picks, latents, lost_at_first
        raise StorageError(
            f"none of {MOST_STAND_INS} samples drawn in place of one that cannot be read can be read either: "
            f"{', '.join(str(folder.folder) for folder in self._data.folders)}. Check the storage of this machine "
            f"({socket.gethostname()})."
        )

    def _with_stand_ins(
        self, picks: Picks, lost: npt.NDArray[np.bool_], attempt: int, codes: Rows, text: Rows
    ) -> Picks:
        block, row = picks.block.copy(), picks.row.copy()
        given = picks.at(lost)
        block[lost], row[lost] = stand_ins(
            given.block, given.row, given.epoch, self._data.block_sizes, self._seed, attempt
        )
        for i in np.flatnonzero(lost).tolist():
            self.read(int(block[i]), int(row[i]), int(picks.epoch[i]), codes[i : i + 1], text[i : i + 1])
        return replace(picks, block=block, row=row)

    def _fill_latents(self, picks: Picks, where: npt.NDArray[np.bool_], latents: Rows) -> bool:
        """Whether the latents of these samples could be read."""
        found = self._lost.read(lambda: self._data.read_latents(picks.block[where], picks.row[where]))
        if found is not None:
            latents[where] = found
        return found is not None

    def _cond(self, text: Rows, seeds: list[int] | None) -> Tensor:
        """[n, L]: classes, zeros, or captions as tokens, with dropout where seeds are given."""
        if self._condition != "text":
            return torch.from_numpy(text).unsqueeze(1)
        encode = self._caption_encoder
        assert encode is not None
        tokens = list(map(encode, text.tolist(), seeds or repeat(None)))
        cond = torch.tensor(tokens, dtype=torch.int64).reshape(len(text), -1 if tokens else self._cond_length)
        assert cond.shape[1] == self._cond_length, f"caption_encoder gave {tuple(cond.shape)}"
        return cond


def join(parts: list[Part], state: LoaderState, pin_memory: bool = False) -> CodeBatch:
    """One batch of its parts, each sample at its place."""
    count = sum(len(part.places) for part in parts)

    def whole(name: str, dtype: torch.dtype | None = None) -> Any:
        given = [getattr(part, name) for part in parts]
        if given[0] is None:
            return None
        out = torch.empty(count, *given[0].shape[1:], dtype=dtype or given[0].dtype, pin_memory=pin_memory)
        for part, values in zip(parts, given, strict=True):
            out.numpy()[part.places.numpy()] = values.numpy()
        return out

    return CodeBatch(
        codes=whole("codes", torch.int64),
        cond=whole("cond"),
        latents=whole("latents"),
        weights=torch.ones(count),
        sample_ids=whole("sample_ids"),
        epochs=whole("epochs"),
        state=state,
        lost=sum(int(part.lost.sum()) for part in parts),
        news=[line for part in parts for line in part.news],
    )


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
    if condition == "class" and data.labelled < data.recorded:
        raise DataError(
            f"the model is conditional on classes, but {data.recorded - data.labelled} of {data.recorded} samples in "
            f"{data.folder} have none. Make the image shards with classes (tools/make_shards.py --class-folders)."
        )
    if condition == "text" and data.captioned == 0:
        raise DataError(
            f"the model is conditional on captions, but no sample in {data.folder} has one. Make the image shards with "
            "captions (tools/make_shards.py --captions)."
        )
    if condition == "text" and data.captioned < data.recorded:
        missing = data.recorded - data.captioned
        logger.warning(
            "%d of %d samples in %s have no caption: they train as empty", missing, data.recorded, data.folder
        )


class CodeLoader:
    """Endless batches of one rank. Content depends on (seed, start) alone, not on ranks or workers."""

    def __init__(
        self,
        data: Mixture,
        *,
        caption_encoder: CaptionEncoder | None,
        caption_dropout: float = 0.0,
        cond_length: int,
        condition: str,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        targets: str = "draws",
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        start: LoaderState | None = None,
        lost: LostBlocks | None = None,
    ) -> None:
        """caption_dropout: share of captions that are read as empty.

        rank, world_size: data-parallel; workers: processes of this rank that share its batches, 0 for none.

        prefetch: batches that the workers make ahead; pin_memory: hand batches over in page-locked memory, for CUDA.

        lost: which blocks cannot be read any more, as far as is known; a shard that cannot be is waited for by it.

        Raises: DataError where the ranks cannot share the batch, the start is of other data, or the shards lack what
        the targets or the condition need.
        """
        self._share = check_share(global_batch_size, world_size)
        self._maker = SampleMaker(
            data,
            targets=targets,
            condition=condition,
            cond_length=cond_length,
            caption_encoder=caption_encoder,
            caption_dropout=caption_dropout,
            seed=seed,
            lost=lost,
        )
        self._data, self._order = data, data.order(seed)
        self._code_shape = data.settings.code_shape
        self._batch, self._rank, self._world_size = global_batch_size, rank, world_size
        self._workers, self._prefetch, self._pin_memory = workers, prefetch, pin_memory
        self._start = (start or LoaderState()).position(self._order.samples)
        self._windows: dict[int, LaneWindows] = {}

    @property
    def samples_per_epoch(self) -> int:
        """Samples in an epoch: one pass over the data, or as many passes over each folder as its weight says."""
        return self._order.samples

    def files(self) -> dict[Path, int]:
        """The shards that this rank's lanes are made of in the epoch that it starts in, with their sizes.

        A rank without a lane of its own reads of all.
        """
        own = np.arange(self._rank, self._order.lanes, self._world_size)
        lanes = own if len(own) else np.arange(self._order.lanes)
        blocks = self._order.blocks(self._start // self._order.samples, lanes)
        return self._data.files(blocks)

    def __iter__(self) -> Iterator[CodeBatch]:
        parts, each = batches_in_order(self._part, self._workers, prefetch=self._prefetch), max(1, self._workers)
        position = self._start
        while True:
            position += self._batch
            yield join(list(islice(parts, each)), LoaderState.at(position, self._order.samples), self._pin_memory)

    def _part(self, number: int) -> Part:
        """Part `number` % W of batch `number` // W after the start; a worker is handed the same part of every batch."""
        batch, part = divmod(number, max(1, self._workers))
        picks = self._order.picks(self._start + batch * self._batch, self._batch)
        picks = picks.at(rank_share(picks.lane, self._world_size, self._rank))
        places = np.flatnonzero(self._part_of(picks.lane) == part)
        picks = picks.at(places)
        if part not in self._windows:
            lanes = np.arange(self._rank, self._order.lanes, self._world_size)
            lanes = lanes[self._part_of(lanes) == part]
            self._windows[part] = LaneWindows(
                self._order, lanes, self._maker.read, self._code_shape, self._maker.text_type
            )
        return self._maker.make(picks, *self._windows[part].take(picks), places)

    def _part_of(self, lane: IntArray) -> IntArray:
        """Which worker makes the samples of each lane."""
        return lane // self._world_size % max(1, self._workers)


def validation_batches(
    data: Mixture,
    *,
    caption_encoder: CaptionEncoder | None,
    cond_length: int,
    condition: str,
    global_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    targets: str = "draws",
    lost: LostBlocks | None = None,
) -> Iterator[CodeBatch]:
    """Every sample once, in order, the same in every call; each rank gets ceil(N / B) batches of B / world_size.

    The last global batch is filled up with samples of weight 0; those that cannot be read have it too, and are known to
    `lost` the next time. Captions are encoded without dropout.
    Raises: as CodeLoader, at once.
    """
    share = check_share(global_batch_size, world_size)
    maker = SampleMaker(
        data,
        targets=targets,
        condition=condition,
        cond_length=cond_length,
        caption_encoder=caption_encoder,
        seed=seed,
        lost=lost,
    )
    ends = np.cumsum(data.block_sizes)

    def batch_from(first: int) -> CodeBatch:
        places = first + rank * share + np.arange(share)
        inside = np.minimum(places, data.samples - 1)
        block = np.searchsorted(ends, inside, side="right")
        row = inside - (ends[block] - data.block_sizes[block])
        codes = np.empty((share, *data.settings.code_shape), "<u2")
        text = np.zeros(share, maker.text_type)
        breaks = np.flatnonzero((np.diff(block) != 0) | (np.diff(row) != 1)) + 1
        for run in np.split(np.arange(share), breaks):
            here = slice(int(run[0]), int(run[-1]) + 1)
            maker.read(int(block[run[0]]), int(row[run[0]]), 0, codes[here], text[here])
        none = np.zeros_like(block)
        part = maker.make(Picks(none, none, none, none, block, row), codes, text, np.arange(share), training=False)
        batch = join([part], LoaderState(0, min(first + global_batch_size, data.samples)))
        batch.weights = torch.from_numpy((places < data.samples).astype(np.float32)) * ~part.lost
        return batch

    return map(batch_from, range(0, data.samples, global_batch_size))
