"""Triton's kernels in Triton's interpreter, on the CPU, in a process that has not imported Triton yet: it asks once."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

from torch import Tensor


@contextmanager
def interpreted_draw() -> Iterator[Callable[..., Tensor]]:
    """megarq.inference.draw_kernel.draw, interpreted, while the body runs."""
    with ProcessPoolExecutor(1, get_context("spawn"), _interpret) as pool:
        yield lambda *args: pool.submit(_draw, *args).result()


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def _draw(*args: object) -> Tensor:
    from megarq.inference.draw_kernel import draw

    return draw(*args)
