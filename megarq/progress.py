"""Progress with its ETA: a bar on a terminal, and in a log a line now and then."""

import sys
from typing import Any

from tqdm import tqdm

SECONDS = 30
"""Between two lines in a log, and before the first."""


def progress_bar(*args: Any, **options: Any) -> "tqdm[Any]":
    """A tqdm of these arguments; one that ends before its first line is due leaves nothing in a log."""
    if not sys.stderr.isatty():
        options |= {"mininterval": SECONDS, "delay": SECONDS}
    return tqdm(*args, **options)
