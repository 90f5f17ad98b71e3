from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cpu_process import cpu_process

from megarq.launch.environment import read_environment
from megarq.launch.process_group import joined, rank_device


@pytest.fixture(scope="session")
def nccl_group() -> Iterator[None]:
    """A group of this one process, as `python megarq/train.py` has; DeepSpeed keeps its groups as long as it lives."""
    alone = read_environment({})
    with joined(alone, rank_device(alone)):
        yield


@pytest.fixture(scope="session")
def on_cpu() -> Iterator[Callable[..., Any]]:
    """`on_cpu(work, *args)`: what a function makes of them in a process without GPUs."""
    with cpu_process() as call:
        yield call
