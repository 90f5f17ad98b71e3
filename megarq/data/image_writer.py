"""From an image folder with captions to webdataset tars.

    collect_captioned / collect_folder  -->  list of SourceImage (file, captions, class)  -->  write_image_shards
    00000.tar:  KEY.jpg  KEY.txt  KEY.json ({"captions": [...]}, if there are several)  KEY.cls (if there is a class)

KEY is the file's path below the image folder without its ending, "/" and "." replaced by "_". Image bytes are copied as
they are. The bytes of the tars depend on the files, the captions and the seed of the shuffle alone.
"""

import csv
import io
import json
import logging
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megarq.data.files import data_file
from megarq.data.image_shards import IMAGE_EXTENSIONS, BadSamples
from megarq.data.order import permutation
from megarq.errors import DataError

logger = logging.getLogger(__name__)


@dataclass
class SourceImage:
    """One picture of the folder and what is said about it."""

    path: Path
    """The image file."""
    key: str
    """Its name in the shards."""
    captions: list[str] = field(default_factory=list)
    """Its captions; may be empty."""
    label: int | None = None
    """Its class, if any."""


def collect_folder(images: Path, *, class_folders: bool = False) -> list[SourceImage]:
    """Every image below a folder, sorted by path, with the caption of the .txt beside it, if there is one.

    class_folders: the first folder on the way to an image is its class, numbered in sorted order.
    Raises: DataError where there are no images, or one lies outside the class folders.
    """
    paths = sorted(path for path in images.rglob("*") if _is_image(path) and path.is_file())
    if not paths:
        raise DataError(
            f"no images below {images} ({' '.join('.' + name for name in IMAGE_EXTENSIONS)}). Check --images."
        )
    labels: dict[str, int] = {}
    if class_folders:
        labels = {name: label for label, name in enumerate(class_names(images))}
    collected = []
    for path in paths:
        relative = path.relative_to(images)
        if class_folders and len(relative.parts) == 1:
            raise DataError(f"{path} lies in no class folder. Move it into one, or leave --class-folders out.")
        label = labels[relative.parts[0]] if class_folders else None
        collected.append(SourceImage(path, _key(relative), _caption_beside(path), label))
    return collected


def class_names(images: Path) -> list[str]:
    """The class folders below `images` in the order of their labels."""
    return sorted(path.name for path in images.iterdir() if path.is_dir())


def collect_captioned(images: Path, table: Path, bad: BadSamples) -> list[SourceImage]:
    """The images that a .csv or .tsv with columns image, caption and optionally label names, in its order.

    `image` is a path below `images`. Several rows of one image are its captions. Rows whose image is missing are
    counted in `bad`. Raises: DataError for a table that cannot be read, lacks a column or has no usable row.
    """
    collected: dict[Path, SourceImage] = {}
    for line, row in _rows(table):
        name, caption = (row["image"] or "").strip(), (row["caption"] or "").strip()
        path = images / name
        bad.count_seen()
        if path not in collected and not (_is_image(path) and path.is_file()):
            bad.skip(str(table), f"line {line}", f"no image file {path}")
            continue
        image = collected.setdefault(path, SourceImage(path, _key(Path(name))))
        if caption:
            image.captions.append(caption)
        label = (row.get("label") or "").strip()
        if label:
            image.label = _label(label, table, line)
    if not collected:
        raise DataError(f"{table} names no image that exists below {images}. Check --images and the column `image`.")
    bad.finish()
    return list(collected.values())


def _rows(table: Path) -> Iterator[tuple[int, dict[str, str | None]]]:
    """(line number, columns by name) of each row."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",", strict=True)
            columns = reader.fieldnames or []
            lacking = [name for name in ("image", "caption") if name not in columns]
            if lacking:
                raise DataError(
                    f"{table} has no column {lacking[0]!r}; its first line names {', '.join(columns) or 'nothing'}. "
                    "Give it a first line with image, caption and optionally label (tabs for .tsv, commas for .csv)."
                )
            for row in reader:
                yield reader.line_num, row
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{table} cannot be read as a UTF-8 table ({error}). Check --captions.") from error


def _label(text: str, table: Path, line: int) -> int:
    if not text.isdecimal():
        raise DataError(f"{table} line {line}: label {text!r} is no class number. Number the classes 0, 1, 2 ...")
    return int(text)


def _is_image(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and not path.name.startswith(".")


def _key(relative: Path) -> str:
    return str(relative.with_suffix("")).replace("/", "_").replace("\\", "_").replace(".", "_")


def _caption_beside(path: Path) -> list[str]:
    text = path.with_suffix(".txt")
    if not text.is_file():
        return []
    try:
        caption = text.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{text} is not UTF-8 text ({error}). Convert it.") from error
    return [caption] if caption else []


def write_image_shards(
    images: Sequence[SourceImage],
    output: Path,
    *,
    samples_per_shard: int,
    prefix: str = "",
    shuffle_seed: int | None = 0,
) -> list[Path]:
    """Write `{prefix}00000.tar` .. with up to `samples_per_shard` images each, shuffled unless the seed is None.

    Raises: DataError for two images of one key, an unreadable image, or an output folder with shards of another list.
    """
    if samples_per_shard < 1:
        raise DataError(f"--samples-per-shard {samples_per_shard}: use 1 or more, such as 1000.")
    _check_keys(images)
    order: Iterable[int] = range(len(images))
    if shuffle_seed is not None:
        order = permutation(len(images), shuffle_seed).tolist()
    shuffled = [images[index] for index in order]
    shards = [
        output / f"{prefix}{start // samples_per_shard:05d}.tar" for start in range(0, len(images), samples_per_shard)
    ]
    output.mkdir(parents=True, exist_ok=True)
    foreign = sorted(set(output.glob(f"{prefix}[0-9][0-9][0-9][0-9][0-9].tar")) - set(shards))
    if foreign:
        raise DataError(
            f"{output} already holds {foreign[0].name}, which is none of the {len(shards)} shards to be written. "
            "Remove the old shards, or choose another --output or --prefix."
        )
    for number, shard in enumerate(shards):
        _write_shard(shard, shuffled[number * samples_per_shard : (number + 1) * samples_per_shard])
    return shards


def _check_keys(images: Sequence[SourceImage]) -> None:
    paths: dict[str, Path] = {}
    for image in images:
        if paths.setdefault(image.key, image.path) is not image.path:
            raise DataError(
                f"{paths[image.key]} and {image.path} have the same key {image.key!r} (their path without the ending, "
                "'/' and '.' replaced by '_'). Rename one."
            )


def _write_shard(shard: Path, images: Sequence[SourceImage]) -> None:
    with data_file(shard) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for image in images:
            for extension, content in _members(image).items():
                info = tarfile.TarInfo(f"{image.key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _members(image: SourceImage) -> dict[str, bytes]:
    try:
        members = {image.path.suffix.lower().lstrip("."): image.path.read_bytes()}
    except OSError as error:
        raise DataError(f"{image.path} cannot be read ({error}). Mend or remove it.") from error
    if image.captions:
        members["txt"] = image.captions[0].encode()
    if len(image.captions) > 1:
        members["json"] = json.dumps({"captions": image.captions}, ensure_ascii=False).encode()
    if image.label is not None:
        members["cls"] = str(image.label).encode()
    return members
