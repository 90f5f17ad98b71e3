"""Triton's kernels in Triton's interpreter, on the CPU, in a process that has not imported Triton yet: it asks once."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

import torch
from torch import Tensor


@contextmanager
def interpreted_draw() -> Iterator[Callable[..., Tensor]]:
    """megarq.inference.draw_kernel.draw, interpreted, while the body runs; its tensors come as parts of larger ones."""
    with ProcessPoolExecutor(1, get_context("spawn"), _interpret) as pool:
        yield lambda *args: pool.submit(_draw, *args).result()


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def _draw(logits: Tensor, uniform: Tensor, *settings: float) -> Tensor:
    from megarq.inference.draw_kernel import draw

    return draw(_part(logits), _part(uniform), *settings)  # made here: strides do not outlive the way between processes


def _part(tensor: Tensor) -> Tensor:
    return torch.stack([torch.full_like(tensor, 0.5), tensor], -1)[..., 1]
