"""The windows that a process serves its lanes from: read once, in the order of the bytes, and picked from at random.

    batch -> Picks [n] (lane, window, place ..) -> codes [n, H, W, D] uint16 and text [n]

A window is one or a few runs of rows, and a run is one read of each member that is needed. A sample of a lane that is
served elsewhere (the surplus that `rank_share` hands over) is read by itself. A lane keeps one window: 128 KiB of 8x8x4
codes, so 128 MiB where one process serves all 1,024 lanes and as much less as processes share them. Latents, 64 times
as large as codes, are not held: they are read sample by sample as they are served.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from megarq.data.mixture import MixedOrder
from megarq.data.order import IntArray, Picks

Rows = npt.NDArray[Any]
ReadRun = Callable[[int, int, int, Rows, Rows], None]
"""(block, first row, epoch, codes [n, H, W, D] to fill, text [n] to fill)."""


class LaneWindows:
    """The current window of each of some lanes."""

    def __init__(
        self, order: MixedOrder, lanes: IntArray, read: ReadRun, code_shape: tuple[int, ...], text: npt.DTypeLike
    ) -> None:
        """lanes: those that are served from memory; read: fills arrays with consecutive rows of a block.

        text: type of what a sample has besides its codes: a caption (object) or a class (int64).
        """
        self._order, self._read = order, read
        self._slot: IntArray = np.full(order.lanes, -1)
        self._slot[lanes] = np.arange(len(lanes))
        self._lanes = lanes
        self._held: IntArray = np.full((2, len(lanes)), -1)
        """Epoch and number of the window in each slot."""
        self._codes = np.empty((len(lanes), order.window, *code_shape), "<u2")
        self._text: Rows = np.zeros((len(lanes), order.window), text)

    def take(self, picks: Picks) -> tuple[npt.NDArray[np.uint16], Rows]:
        """The codes [n, H, W, D] and the text [n] of these samples, which come in the order of the stream."""
        codes = np.empty((len(picks.lane), *self._codes.shape[2:]), "<u2")
        text = np.zeros(len(codes), self._text.dtype)
        slot = self._slot[picks.lane]
        for i in np.flatnonzero(slot < 0).tolist():
            one = slice(i, i + 1)
            self._read(int(picks.block[i]), int(picks.row[i]), int(picks.epoch[i]), codes[one], text[one])
        windows = np.stack([picks.epoch, picks.window])
        for epoch, window in np.unique(windows, axis=1).T.tolist():  # ascending: a lane's windows in order
            here = np.flatnonzero((picks.epoch == epoch) & (picks.window == window) & (slot >= 0))
            mine = slot[here]
            old = (self._held[0, mine] != epoch) | (self._held[1, mine] != window)
            for stale in np.unique(mine[old]).tolist():
                self._load(stale, epoch, window)
            codes[here] = self._codes[mine, picks.place[here]]
            text[here] = self._text[mine, picks.place[here]]
        return codes, text

    def _load(self, slot: int, epoch: int, window: int) -> None:
        self._held[:, slot] = -1  # nothing, should a read fail
        start = 0
        for block, row, rows in self._order.runs(epoch, int(self._lanes[slot]), window):
            here = slice(start, start + rows)
            self._read(block, row, epoch, self._codes[slot, here], self._text[slot, here])
            start += rows
        self._held[:, slot] = epoch, window
