"""A process without GPUs, for what a GPU's numbers are held against.

    with cpu_process() as call:
        call(work, 3)       -> work(3) there, where DeepSpeed is the CPU's and the default group is gloo's, of one

It is spawned, since a process that has used a GPU cannot be forked. A function travels by its name, so it must stand at
the top of a module of tests/helpers.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def cpu_process() -> Iterator[Callable[..., Any]]:
    """The process, while the body runs."""
    with ProcessPoolExecutor(1, get_context("spawn"), _join) as pool:
        yield lambda work, *args: pool.submit(work, *args).result()


def _join() -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} | alone
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
