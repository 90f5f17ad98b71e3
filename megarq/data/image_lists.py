"""What pictures there are, and what is said about each: folders, tables, MS-COCO's JSON, lists of addresses.

    photos/a.jpg, photos/a.txt            folder            caption beside the picture
    train/n01440764/x.JPEG                class folders     the folder is the class, numbered in sorted order
    image,caption[,label]                 .csv, .tsv        several rows of one picture are its captions
    {"images": ..., "annotations": ...}   .json             MS-COCO captions
    caption<TAB>url  or  url<TAB>caption  .tsv              CC-3M, CC-12M; row n is the picture named n

The pictures lie in a folder or a zip (`image_stores`); their bytes are not read here. A sample's KEY is the picture's
path without its ending, "/" and "." replaced by "_".
"""

import csv
import hashlib
import json
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megarq.data.faults import Fault, Faults
from megarq.data.image_shards import IMAGE_EXTENSIONS
from megarq.data.image_stores import ImageStore, is_image
from megarq.errors import DataError


@dataclass(slots=True)
class SourceImage:
    """One picture of a collection and what is said about it."""

    name: str
    """The picture's file in the store."""
    captions: list[str] = field(default_factory=list)
    """Its captions; may be empty."""
    label: int | None = None
    """Its class, if any."""

    @property
    def key(self) -> str:
        """Its name in the shards."""
        return posixpath.splitext(self.name)[0].replace("/", "_").replace("\\", "_").replace(".", "_")


class ImageList:
    """Pictures of a store, each with a key of its own, to be packed by `image_writer`."""

    def __init__(
        self, store: ImageStore, images: Iterable[SourceImage], faults: Faults, unused: Mapping[str, int]
    ) -> None:
        """unused: how many things of each kind no sample is made of, for the report.

        Pictures whose key is that of an earlier one, or whose name is no text, are skipped. Raises: DataError above the
        accepted rate of faults.
        """
        self._store, self.unused = store, dict(unused)
        by_key: dict[str, SourceImage] = {}
        for image in images:
            first = by_key.setdefault(image.key, image)
            if first is not image:
                reason = f"{first.name} has the same key (paths without ending, '/' and '.' replaced by '_')"
                faults.skip(str(store.path), image.name, Fault.DUPLICATE_KEY, reason)
            elif not _is_text(image.name):
                del by_key[image.key]
                faults.skip(str(store.path), ascii(image.name), Fault.UNREADABLE_TEXT, "the file's name is not UTF-8")
        self.images = list(by_key.values())
        faults.finish()

    def __len__(self) -> int:
        return len(self.images)

    def key(self, index: int) -> str:
        """Name of a sample in the shards."""
        return self.images[index].key

    def fingerprint(self) -> str:
        """sha256 of names, captions and classes."""
        sha256 = hashlib.sha256()
        for image in self.images:
            sha256.update(json.dumps([image.name, image.captions, image.label]).encode() + b"\n")
        return sha256.hexdigest()

    def packed(self, index: int) -> bytes:
        """A sample as members of a tar: KEY.jpg, KEY.txt (first caption), KEY.json ({"captions": [...]}, where there
        are several), KEY.cls. Raises: OSError where the picture cannot be read."""
        image = self.images[index]
        members = {image.name.rpartition(".")[2].lower(): self._store.read(image.name)}
        if image.captions:
            members["txt"] = image.captions[0].encode()
        if len(image.captions) > 1:
            members["json"] = json.dumps({"captions": image.captions}, ensure_ascii=False).encode()
        if image.label is not None:
            members["cls"] = str(image.label).encode()
        return b"".join(_member(f"{image.key}.{extension}", content) for extension, content in members.items())


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _is_text(text: str) -> bool:
    """Whether a text read with `surrogateescape` was UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def list_folder(store: ImageStore, faults: Faults, *, class_folders: bool = False) -> ImageList:
    """Every picture of a store, sorted by name, with the caption of the .txt beside it, if there is one.

    class_folders: the first folder on the way to a picture is its class, numbered in sorted order.
    Raises: DataError where there are no pictures, one lies outside the class folders, or faults exceed their rate.
    """
    names = [name for name in store.files if is_image(name)]
    if not names:
        endings = " ".join("." + name for name in IMAGE_EXTENSIONS)
        raise DataError(f"no images below {store.path} ({endings}). Check --images.")
    labels = {name: label for label, name in enumerate(store.folders)}
    texts = {name for name in store.files if name.endswith(".txt")}
    images = []
    faults.count_unlisted(str(store.path), store.lost)
    faults.count_seen(len(names))
    for name in names:
        folder, slash, _ = name.partition("/")
        if class_folders and not slash:
            raise DataError(
                f"{name} in {store.path} lies in no class folder. Move it into one, or leave --class-folders out."
            )
        text = posixpath.splitext(name)[0] + ".txt"
        try:
            caption = store.read(text).decode("utf-8-sig").strip() if text in texts else ""
        except (UnicodeDecodeError, OSError) as error:
            faults.skip(str(store.path), name, Fault.UNREADABLE_TEXT, f"{text}: {error}")
            continue
        images.append(SourceImage(name, [caption] if caption else [], labels[folder] if class_folders else None))
    alone = texts - {posixpath.splitext(name)[0] + ".txt" for name in names}
    return ImageList(store, images, faults, {".txt files without a picture": len(alone)})


class _Row(NamedTuple):
    place: str
    """Where it stands, for messages."""
    name: str
    """The picture's file."""
    caption: str
    """What is said about it."""
    label: str = ""
    """Its class, if any."""
    fault: str = ""
    """What is wrong with the row's text, if anything."""


def list_captioned(store: ImageStore, captions: Path, faults: Faults, *, first_number: int = 0) -> ImageList:
    """The pictures that a table, COCO's JSON or a list of addresses names, in its order; each row is one caption.

    first_number: the number that is the name of a list's first picture. Rows whose picture is missing and rows that
    cannot be read are faults. Raises: DataError for a file of another kind, one without a usable row, or too many
    faults.
    """
    there = {name for name in store.files if is_image(name)}
    images: dict[str, SourceImage] = {}
    unnamed, unused = set(there), Counter[str]()
    for row in _rows(captions, there, first_number, unused):
        faults.count_seen()
        name = posixpath.normpath(row.name) if row.name else ""
        unnamed.discard(name)
        if row.fault or not _is_text(row.caption):
            faults.skip(str(captions), row.place, Fault.UNREADABLE_TEXT, row.fault or "the caption is not UTF-8")
        elif name not in there:
            faults.skip(str(captions), row.place, Fault.MISSING_FILE, f"no picture {row.name!a} in {store.path}")
        else:
            image = images.setdefault(name, SourceImage(name))
            if row.caption.strip():
                image.captions.append(row.caption.strip())
            if row.label.strip():
                image.label = _label(row.label.strip(), f"{captions} {row.place}")
    if not images:
        raise DataError(f"{captions} names no image that exists in {store.path}. Check --images and --captions.")
    unused["pictures that no row names"] = len(unnamed)
    return ImageList(store, images.values(), faults, unused)


def _label(text: str, place: str) -> int:
    if not text.isdecimal():
        raise DataError(f"{place}: label {text!r} is no class number. Number the classes 0, 1, 2 ...")
    return int(text)


def _rows(captions: Path, names: set[str], first_number: int, unused: Counter[str]) -> Iterator[_Row]:
    try:
        if captions.suffix.lower() == ".json":
            yield from _coco_rows(captions, unused)
            return
        with captions.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            columns = file.readline().rstrip("\r\n").split("\t")
        addresses = [place for place, text in enumerate(columns) if text == "url" or re.match(r"https?://", text)]
        if len(columns) == 2 and len(addresses) == 1:
            yield from _address_rows(captions, 1 - addresses[0], _by_number(names), first_number)
        else:
            yield from _table_rows(captions)
    except (OSError, csv.Error) as error:
        raise DataError(f"{captions} cannot be read ({error}). Check --captions.") from error


def _table_rows(table: Path) -> Iterator[_Row]:
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",", strict=True)
        columns = reader.fieldnames or []
        lacking = [name for name in ("image", "caption") if name not in columns]
        if lacking:
            raise DataError(
                f"{table} has no column {lacking[0]!r}; its first line is {','.join(columns)!a}. Give a table "
                "with image, caption and optionally label (tabs for .tsv, commas for .csv), a .tsv of caption "
                "and url, or the .json of MS-COCO's captions."
            )
        for row in reader:
            fault = "more fields than columns: quote a caption with commas" if None in row else ""
            name, caption, label = (row.get(column) or "" for column in ("image", "caption", "label"))
            yield _Row(f"line {reader.line_num}", name.strip(), caption, label, fault)


def _coco_rows(captions: Path, unused: Counter[str]) -> Iterator[_Row]:
    try:
        content = json.loads(captions.read_bytes().decode("utf-8-sig", "surrogateescape"))
        files = {image["id"]: str(image["file_name"]) for image in content["images"]}
        said = [(note["image_id"], str(note["caption"])) for note in content["annotations"]]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{captions} is no COCO caption file ({type(error).__name__}: {error}). Give one like "
            "captions_train2014.json: `images` with id and file_name, `annotations` with image_id and caption."
        ) from error
    unused["images of the JSON without annotation"] = len(files.keys() - {image for image, _ in said})
    for number, (image, caption) in enumerate(said):
        yield _Row(f"annotation {number}", files.get(image, f"image_id {image}"), caption)


def _by_number(names: set[str]) -> dict[int, str]:
    """The pictures whose names are numbers, padded with zeros or not."""
    numbered: dict[int, str] = {}
    for name in sorted(names):
        stem = posixpath.splitext(posixpath.basename(name))[0]
        if stem.isascii() and stem.isdecimal() and numbered.setdefault(int(stem), name) != name:
            raise DataError(
                f"{numbered[int(stem)]} and {name} are both picture {int(stem)}. Remove one, or name the pictures in a "
                "table with the columns image and caption."
            )
    return numbered


def _address_rows(table: Path, column: int, numbered: dict[int, str], first_number: int) -> Iterator[_Row]:
    """Rows of a list without quotes: a line is a row, and a first line `caption<TAB>url` is none."""
    number = first_number
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for line, text in enumerate(file, 1):
            fields = text.rstrip("\r\n").split("\t")
            if line == 1 and "url" in fields:
                continue
            fault = "" if len(fields) == 2 else f"{len(fields)} fields instead of 2"
            caption = "" if fault else fields[column]
            yield _Row(f"line {line}", numbered.get(number, str(number)), caption, fault=fault)
            number += 1
    beyond = sorted(place for place in numbered if not first_number <= place < number)
    if beyond:
        raise DataError(
            f"{numbered[beyond[0]]} is picture {beyond[0]}, but {table} has the rows {first_number} to {number - 1}. "
            f"Use --first-number {1 - first_number} if the pictures are numbered so, or remove those of another list."
        )
