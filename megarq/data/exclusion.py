"""Lists of samples to leave out, such as evaluation pictures that stand in the training data.

    # COCO captions found in YFCC
    000017.tar/4429
    000017.tar/4430
    9f3c-cat.jpg

One sample on a line: the code shard's file name, a slash and the sample's key, or a key alone, which is looked for in
all shards. Blank lines, and lines that begin with "# ", say nothing. Only the shards that are named are read.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megarq.data.code_shards import CodeShards, ShardError
from megarq.data.order import IntArray
from megarq.errors import DataError

logger = logging.getLogger(__name__)

SHOWN = 5


def read_list(file: Path) -> set[str]:
    """The entries of a list. Raises: DataError where it cannot be read."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--exclude-keys {file} cannot be read ({error}). Give a text file, a key a line.") from error
    return {line for text in lines if (line := text.rstrip("\r")).strip() and not line.startswith("# ")}


def excluded_samples(
    folders: Sequence[CodeShards], lists: Sequence[Sequence[Path]], without_lost: bool = False
) -> list[IntArray]:
    """Numbers of the samples of each folder that its lists name, ascending; entries that match nothing are warned of.

    without_lost: nothing is left out of blocks that cannot be read: training cannot read them either.

    Raises: DataError where a list cannot be read, or otherwise a shard.
    """
    entries = {file: read_list(file) for files in lists for file in files}
    matched: dict[Path, set[str]] = {file: set() for file in entries}
    excluded = []
    for codes, files in zip(folders, lists, strict=True):
        samples, found = _find(codes, set().union(*(entries[file] for file in files)), without_lost)
        for file in files:
            matched[file] |= entries[file] & found
        excluded.append(samples)
        if files:
            logger.warning("%s: %d of %d samples are left out", codes.folder, len(samples), codes.samples)
    for file, wanted in entries.items():
        missing = sorted(wanted - matched[file])
        if missing:
            names = ", ".join(missing[:SHOWN])
            logger.warning("%s: %d of %d keys are in no shard, such as %s", file, len(missing), len(wanted), names)
    return excluded


def _find(codes: CodeShards, entries: Iterable[str], without_lost: bool) -> tuple[IntArray, set[str]]:
    """Numbers of the samples that these entries name, and the entries that name one."""
    files = {shard.file for shard in codes.manifest.shards}
    named: dict[str, set[str]] = {}
    anywhere: set[str] = set()
    for entry in entries:
        file, _, key = entry.partition("/")
        if file in files:
            named.setdefault(file, set()).add(key)
        else:
            anywhere.add(entry)
    numbers: list[IntArray] = []
    found: set[str] = set()
    for block, rows in enumerate(codes.block_sizes.tolist()):
        file = codes.file_of(block)
        here = named.get(file, set())
        if rows == 0 or not (here or anywhere):
            continue
        try:
            keys = codes.text_run("keys", block, 0, rows)
        except ShardError as error:
            if not without_lost:
                raise
            logger.warning("%s None of the %d samples of a block are left out.", error, rows)
            continue
        places = np.array([row for row, key in enumerate(keys) if key in here or key in anywhere], np.int64)
        for key in (keys[row] for row in places):
            found |= {f"{file}/{key}"} if key in here else set()
            found |= {key} if key in anywhere else set()
        numbers.append(codes.sample_ids(np.full_like(places, block), places))
    return np.concatenate(numbers or [np.array([], np.int64)]), found
