"""Memory that does not suffice, told as an error for people."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megarq.errors import TooLittleMemoryError


def out_of_memory(error: BaseException | None) -> bool:
    """Whether memory is behind an error; where a CUDA graph is captured, another is raised on top."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Raise TooLittleMemoryError where the body, which makes `what`, runs out of memory, on a GPU or a CPU."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise TooLittleMemoryError(
            f"{what} do not fit the memory that is left. Use a smaller batch size (--batch-size)."
        ) from error
