"""What the pictures of an evaluation set are to show: lists of captions and of classes.

captions_val2014.json                       COCO: captions drawn by seed, of another image each as far as they go
captions_val2014_30K_samples.json           a list to be taken as it is: COCO's format (the first caption of each
                                            image, by image id), a list of strings or of objects, or a .csv
Validation_GCC-1.1.0-Validation.tsv         CC-3M as published, caption<TAB>url; or image shards with captions
prompts.txt                                 a caption a line
count, classes                              0 0 0 1 1 1 2 2 ..
"""

import csv
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megarq.data.faults import Faults
from megarq.data.files import expand_shards
from megarq.data.image_shards import read_samples
from megarq.data.image_stores import is_image
from megarq.data.order import permutation
from megarq.data.picture_set import LONGEST_PROMPT, MOST_PICTURES, Item
from megarq.errors import ConfigError, DataError
from megarq.parallel.initialization import derived_seed

logger = logging.getLogger(__name__)

_CAPTIONS, _NAMES = ("caption", "prompt", "text"), ("image_id", "id", "uid")
"""Fields that hold an item's caption and its name, whichever is there."""


def coco_items(path: Path, count: int, seed: int) -> list[Item]:
    """`count` captions of COCO's annotations, in an order that the seed decides, so that fewer are the first of more.

    One caption each of so many images; only where there are too few images, another caption of each, and so on: two
    captions of one picture would weigh it double against the reference pictures, and DALL-Eval's list holds none.
    Raises: DataError for another kind of file, or fewer captions than `count`.
    """
    captions = _coco_captions(path, _json(path))
    total = sum(map(len, captions.values()))
    if total < count:
        raise DataError(
            f"{path} has {total} captions of {len(captions)} images, fewer than --count {count}. Use --count {total} "
            "or less, or the whole captions_val2014.json."
        )
    images = sorted(captions)
    order = [images[place] for place in permutation(len(images), seed).tolist()]
    items: list[Item] = []
    turn = 0
    while len(items) < count:
        for image in order:
            texts = captions[image]
            if turn < len(texts):
                first = derived_seed(seed, "caption", image) % len(texts)
                items.append(Item(texts[(first + turn) % len(texts)], id=image))
        turn += 1
    return items[:count]


def listed_items(path: Path, count: int | None = None) -> list[Item]:
    """The items of a list as they stand there, or the first `count`: JSON, or a .csv with a column `caption`.

    In JSON: strings; objects with `caption` and perhaps `image_id`; or COCO's annotations, of which each image gives
    its first caption, by image id, as the authors' list is read.
    Raises: DataError for another kind of file, or fewer items than `count`.
    """
    if path.suffix.lower() == ".csv":
        items = [_item(row, f"{path} row {number}") for number, row in enumerate(_csv_rows(path), start=1)]
    else:
        content = _json(path)
        if isinstance(content, dict):
            captions = _coco_captions(path, content)
            items = [Item(captions[image][0], id=image) for image in sorted(captions)]
        elif isinstance(content, list):
            items = [_item(entry, f"{path} entry {number}") for number, entry in enumerate(content, start=1)]
        else:
            raise DataError(f"{path} holds a {type(content).__name__}. Give a list of captions, or COCO's annotations.")
    return _first(items, count, str(path))


def caption_items(given: Sequence[str], count: int | None = None) -> list[Item]:
    """The captions of a .tsv of caption and url (or picture and caption), by line, or of the pictures of image shards.

    An item's id is its line, counted from 0, or its key. Of several captions of a picture the first counts.
    Raises: DataError for lines of another kind, pictures without caption, or fewer items than `count`.
    """
    if len(given) == 1 and given[0].lower().endswith((".csv", ".json")):
        raise DataError(f"{given[0]} is no list like CC-3M's. Give it to evaluation/coco.py --items.")
    if len(given) == 1 and (given[0].endswith(".tsv") or (Path(given[0]).is_file() and not given[0].endswith(".tar"))):
        return _first(_tsv_items(Path(given[0])), count, given[0])
    faults, items = Faults(), []
    for shard in expand_shards(given):
        for sample in read_samples(shard, faults):
            if not sample.captions:
                raise DataError(f"{sample.key} in {shard} has no caption. Give shards whose pictures all have one.")
            items.append(Item(sample.captions[0], id=sample.key))
    faults.finish()
    return _first(items, count, given[0])


def prompt_items(path: Path) -> list[Item]:
    """The captions of a text file, one a line; an item's id is its line, counted from 1. Blank lines are left out.

    Raises: DataError for a file that cannot be read or holds no caption, lines that carriage returns alone
    end, or one of more characters than LONGEST_PROMPT.
    """
    lines = _lines(path)
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, line in numbered:
        if "\r" in line:
            raise DataError(f"{path} line {number} holds carriage returns. End lines with a line feed, a caption each.")
    items = [Item(_text(line, f"{path} line {number}"), id=number) for number, line in numbered]
    for item in items:
        if item.prompt is not None and len(item.prompt) > LONGEST_PROMPT:
            raise DataError(f"{path} line {item.id} has {len(item.prompt)} characters: give at most {LONGEST_PROMPT}.")
    if not items:
        raise DataError(f"{path} holds no caption, but {len(lines)} blank lines. Give a caption a line.")
    if len(items) < len(lines):
        logger.warning("%s: %d blank lines are left out.", path, len(lines) - len(items))
    return items


def class_items(count: int, classes: int) -> list[Item]:
    """`count` classes in rising order, each equally often; where that is not possible, the first ones once more."""
    share, rest = divmod(count, classes)
    return [Item(label=label) for label in range(classes) for _ in range(share + (label < rest))]


def _first(items: list[Item], count: int | None, source: str) -> list[Item]:
    if not items:
        raise DataError(f"{source} is empty. Give a list of captions.")
    if count is not None and len(items) < count:
        raise DataError(f"{source} has {len(items)} captions, fewer than --count {count}. Use --count {len(items)}.")
    return items[:count]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Check the path.") from error
    except ValueError as error:
        raise DataError(
            f"{path} cannot be read as JSON ({error}). Copy the file again; a .csv of captions is given to --items."
        ) from error


def _lines(path: Path) -> list[str]:
    """The lines of UTF-8 text."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Give UTF-8 text, and check the path.") from error
    return [line.rstrip("\r") for line in (lines if lines[-1] else lines[:-1])]


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}). Check the path, or copy the file again.") from error


def _item(entry: Any, place: str) -> Item:
    fields = {"caption": entry} if isinstance(entry, str) else entry
    if isinstance(fields, Mapping):
        caption = next((fields[name] for name in _CAPTIONS if name in fields), None)
        name = next((fields[name] for name in _NAMES if name in fields), None)
        if isinstance(caption, str) and caption.strip() and isinstance(name, int | str | None):
            return Item(_text(caption, place), id=name)
    raise DataError(
        f"{place} is {entry!r:.80}, no caption. Give strings, or objects with caption and perhaps image_id."
    )


def _coco_captions(path: Path, content: Any) -> dict[int, list[str]]:
    """The captions of each image, in the order of the file; blank ones are left out."""
    captions: dict[int, list[str]] = {}
    try:
        for note in content["annotations"]:
            if note["caption"].strip():
                text = _text(note["caption"], f"{path}: image {note['image_id']}")
                captions.setdefault(int(note["image_id"]), []).append(text)
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path} is no COCO caption file ({type(error).__name__}: {error}). Give one like captions_val2014.json, "
            "with `annotations` of image_id and caption, or a list of captions to --items."
        ) from error
    return captions


def _tsv_items(path: Path) -> list[Item]:
    items = []
    rows = _lines(path)
    if rows and "url" in rows[0].split("\t"):
        rows.pop(0)
    for number, row in enumerate(rows):
        texts = [field for field in row.split("\t") if not _is_address(field)]
        if row.count("\t") != 1 or len(texts) != 1 or not texts[0].strip():
            raise DataError(
                f"{path} row {number} is {row!r:.80}. Give a list like CC-3M's, of caption<TAB>url, or image shards."
            )
        items.append(Item(_text(texts[0], f"{path} row {number}"), id=number))
    return items


def _is_address(field: str) -> bool:
    return re.match(r"https?://", field) is not None or is_image(field)


def _text(caption: str, place: str) -> str:
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: {caption!a} is no text ({error}). Remove or mend it.") from error
    return caption.strip()


def check_count(count: int | None) -> None:
    """Raise ConfigError for a count of none or less, or of more pictures than a set may hold."""
    if count is not None and not 1 <= count <= MOST_PICTURES:
        raise ConfigError(f"--count {count}: give 1 to {MOST_PICTURES:,}.")
