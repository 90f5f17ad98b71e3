from collections.abc import Iterator

import pytest

from megarq.launch.environment import read_environment
from megarq.launch.process_group import joined, rank_device


@pytest.fixture(scope="module")
def nccl_group() -> Iterator[None]:
    """A group of this one process, as `python megarq/train.py` has."""
    alone = read_environment({})
    with joined(alone, rank_device(alone)):
        yield
