"""A set of generated pictures on disk: written by any number of workers, whole or not at all, the same bytes always.

    SET/pictures.json     {"format": "megarq-pictures", "version": 1, "count": 30000, "pictures_per_tar": 512,
                           "condition": "text", "seed": 0,
                           "sampling": {"top_k": 1024, "top_p": 0.95, "temperature": 1.0, "guidance": 1.0},
                           "batch_size": 64, "dtype": "fp32", "threads": 0,
                           "model": {"fingerprint": sha256, "name": "t2i", "weights": "ema", "step": 200000},
                           "items": sha256, "keep_fraction": 1.0, "ranker": null, "resolution": 256, "tp": 1,
                           "complete": true}                          only once all tars are there
    SET/000000.tar ..     00000017.png  00000017.json {"index": 17, "prompt": "a red bus", "id": 179765}  ...
    SET/000017.png  SET/000017.json ..                                 instead of tars, where pictures_per_tar is null

A tar holds consecutive pictures and appears under its name only when whole. A class stands under "class" instead of a
prompt; "id" is the name of the item where it came from. Where pictures were ranked and the best of several candidates
kept, "score" is what the ranker gave, and "candidate" the index that the picture was drawn with. Beside a picture that
is a file of its own stand its seed, sampling, dtype and model as well.
"""

import hashlib
import io
import json
import tarfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from PIL import Image

from megarq.data.files import data_file
from megarq.data.shared_work import locked, remove_leftovers, take_files
from megarq.errors import DataError

FORMAT, VERSION = "megarq-pictures", 1
MOST_PICTURES = 1_000_000
"""Of one set, and of whatever else is drawn by one call."""
LONGEST_PROMPT = 1000
"""Characters of a caption that somebody types, or writes into a file of prompts."""
PICTURES = "pictures.json"
_ENCODERS, _WAITING = 4, 256
"""Threads that compress pictures, and how many of a tar's pictures may wait for them or for the disk."""


@dataclass(frozen=True, slots=True)
class Item:
    """What one picture of a set is to show."""

    prompt: str | None = None
    """A caption, for a model of captions."""
    label: int | None = None
    """A class, for a model of classes."""
    id: int | str | None = None
    """The item's name where it came from, such as COCO's image id."""


@dataclass(frozen=True)
class PictureSettings:
    """What the pictures of a set follow from: pictures.json, but for `complete`."""

    count: int
    """Pictures in the set."""
    pictures_per_tar: int | None
    """Most pictures of one tar; None where each picture is a file of its own."""
    condition: str
    """What the model is asked with: text, class or none."""
    seed: int
    """With a picture's index, all that is random about it."""
    sampling: dict[str, Any]
    """top_k, top_p and temperature: one value, or one for each depth; guidance, which older sets do not tell: 1."""
    batch_size: int
    """Pictures drawn together; batches do not cross tars. Without tars, they are what workers share out."""
    dtype: str
    """Of the RQ-Transformer: fp32, bf16 or fp16."""
    threads: int
    """Threads on a CPU, whose sums round differently with another number; 0 on a GPU."""
    model: dict[str, Any]
    """fingerprint (sha256 of the exported model's files), name of its folder, weights (ema or param), step."""
    items: str
    """sha256 of the list of items."""
    keep_fraction: float
    """Share of the candidates that were kept; 1 where each picture is the only one drawn for its item."""
    ranker: dict[str, Any] | None
    """network and sha256 (of its weights) of what ranked the candidates."""
    resolution: int
    """Height and width of the pictures."""
    tp: int | None = 1
    """Ranks that share the model, whose sums round differently; None in older sets, which do not tell."""

    def save(self, folder: Path, complete: bool) -> None:
        """Write pictures.json, atomically."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self), "complete": complete}
        with data_file(folder / PICTURES) as file:
            file.write(json.dumps(content, indent=1).encode() + b"\n")

    @classmethod
    def load(cls, folder: Path) -> tuple[Self, bool]:
        """(settings, whether the set is complete). Raises: DataError where pictures.json is missing or damaged."""
        path = folder / PICTURES
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise DataError(
                f"{folder} holds no {PICTURES}: it is no set of generated pictures. Make one with evaluation/coco.py, "
                "cc3m.py or class_conditional.py, or tools/sample.py --prompts-file."
            ) from error
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}). Copy the set again, or make it anew.") from error
        found = (content.get("format"), content.get("version")) if isinstance(content, dict) else (None, None)
        if found != (FORMAT, VERSION):
            raise DataError(
                f"{path}: format {found[0]!r} version {found[1]!r}, but this version of MegaRQ reads {FORMAT!r} "
                f"version {VERSION}. Make the set again."
            )
        try:
            content = {"tp": None} | content
            fields = {name: content[name] for name in cls.__dataclass_fields__}
            fields["sampling"] = {"guidance": 1.0} | fields["sampling"]
            return cls(**fields), bool(content["complete"])
        except KeyError as error:
            raise DataError(f"{path} lacks the field {error}. Copy the set again, or make it anew.") from error


class Sample(NamedTuple):
    """A picture of the set, with what it was asked to show."""

    item: Item
    picture: Image.Image
    score: float | None = None
    """What a ranker gave it."""
    candidate: int | None = None
    """The index it was drawn with, where that is not its place in the set."""


Add = Callable[[int, Sample, "Future[bytes]"], None]
"""Writes a picture: its place, what it is, and its PNG."""


class PictureSet:
    """The tars of a set that is being drawn: tar i holds the pictures of places[i]."""

    extension = "tar"

    def __init__(self, folder: Path, settings: PictureSettings, places: Sequence[range]) -> None:
        """Claim the folder by writing pictures.json, unless an earlier run or another worker did.

        Raises: DataError where it was begun with other settings or holds other files, or cannot be written.
        """
        self.folder, self.settings, self.places = folder, settings, places
        self.files = self._names()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--output {folder} cannot be made ({error}). Give another folder.") from error
        with locked(folder, PICTURES, wait=True):
            if (folder / PICTURES).exists():
                found, complete = PictureSettings.load(folder)
                if complete:
                    (folder / f".{PICTURES}.lock").unlink(missing_ok=True)
                _check_settings(folder, found, settings)
                if complete and len(self.done()) < len(self.files):  # somebody removed tars
                    found.save(folder, complete=False)
                return
            foreign = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
            if foreign:
                raise DataError(f"{folder} holds {foreign[0]}, but no {PICTURES}: give --output a folder of its own.")
            settings.save(folder, complete=False)

    def done(self) -> list[int]:
        """Tars that are whole, whoever made them."""
        there = {path.name for path in self.folder.glob(f"*.{self.extension}")}
        return [index for index, file in enumerate(self.files) if file in there]

    def take(self, number: int, workers: int) -> Generator[int, None, None]:
        """Tars for worker `number` of `workers` to make, each locked until the next is asked for: see `take_files`."""
        return take_files(self.folder, self.files, self._is_done, number, workers, self.done())

    def path(self, index: int) -> Path:
        """Where a tar lies."""
        return self.folder / self.files[index]

    def write(self, index: int, samples: Iterable[Sample]) -> None:
        """Write a tar of its samples, in order, as they come; they are compressed while the next are drawn.

        Raises: DataError where the folder cannot be written or the disk is full.
        """
        waiting: deque[tuple[int, Sample, Future[bytes]]] = deque()
        with self._writing(index) as add, ThreadPoolExecutor(_ENCODERS) as encoders:
            for place, sample in zip(self.places[index], samples, strict=True):
                waiting.append((place, sample, encoders.submit(_png, sample.picture)))
                if len(waiting) > _WAITING:
                    add(*waiting.popleft())
            while waiting:
                add(*waiting.popleft())

    def finish(self) -> bool:
        """Call the set complete where it is, and leave nothing of locks and killed runs' half files.

        False where tars are still missing, which other workers hold.
        """
        with locked(self.folder, PICTURES, wait=True):
            if len(self.done()) < len(self.files):
                return False
            if not PictureSettings.load(self.folder)[1]:
                self.settings.save(self.folder, complete=True)
            remove_leftovers(self.folder, self.files)
            (self.folder / f".{PICTURES}.lock").unlink(missing_ok=True)
            return True

    def _names(self) -> list[str]:
        return [f"{index:06d}.tar" for index in range(len(self.places))]

    def _is_done(self, index: int) -> bool:
        return self.path(index).exists()

    @contextmanager
    def _writing(self, index: int) -> Iterator[Add]:
        with (
            data_file(self.path(index)) as raw,
            tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            yield partial(_add, tar)


class LoosePictures(PictureSet):
    """A set without tars: a PNG and a JSON for each picture. What is locked, and made anew if it is not whole, is the
    batch of places[i], by the name of its first picture."""

    extension = "png"

    def done(self) -> list[int]:
        """Batches that are whole, whoever made them."""
        there = {path.name for path in self.folder.iterdir()}
        return [index for index in range(len(self.places)) if there.issuperset(self._members(index))]

    def _names(self) -> list[str]:
        return [f"{places.start:06d}.png" for places in self.places]

    def _is_done(self, index: int) -> bool:
        return all((self.folder / name).exists() for name in self._members(index))

    def _members(self, index: int) -> list[str]:
        return [f"{place:06d}.{extension}" for place in self.places[index] for extension in ("png", "json")]

    @contextmanager
    def _writing(self, index: int) -> Iterator[Add]:
        yield self._write_picture

    def _write_picture(self, place: int, sample: Sample, png: Future[bytes]) -> None:
        settings = {name: getattr(self.settings, name) for name in ("seed", "sampling", "dtype", "model")}
        for extension, content in (("png", png.result()), ("json", _record(place, sample, **settings))):
            with data_file(self.folder / f"{place:06d}.{extension}") as file:
                file.write(content)


def begin_set(folder: Path, settings: PictureSettings, places: Sequence[range]) -> PictureSet:
    """A set with or without tars, as its settings say; raises as `PictureSet` does."""
    kind = LoosePictures if settings.pictures_per_tar is None else PictureSet
    return kind(folder, settings, places)


def items_digest(items: Iterable[Item]) -> str:
    """sha256 of a list of items."""
    sha256 = hashlib.sha256()
    for item in items:
        sha256.update(json.dumps([item.prompt, item.label, item.id]).encode() + b"\n")
    return sha256.hexdigest()


def _check_settings(folder: Path, found: PictureSettings, wanted: PictureSettings) -> None:
    there, now = _flat(found), _flat(wanted)
    for name in there | now:
        if name == "model.name" or (name == "tp" and there[name] is None):
            continue  # a model may be moved and renamed; older sets do not tell how many ranks shared it
        if there.get(name) != now.get(name):
            differ = f"{name}={there.get(name)}, this command has {name}={now.get(name)}"
            if name == "items":
                differ = "other prompts or classes than this command has"
            raise DataError(f"{folder} was begun with {differ}. Repeat the first command, or give another --output.")


def _flat(settings: PictureSettings) -> dict[str, Any]:
    """The fields as JSON holds them, those of a section as section.field."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(asdict(settings))).items():
        flat |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _add(tar: tarfile.TarFile, place: int, sample: Sample, png: Future[bytes]) -> None:
    for extension, content in (("png", png.result()), ("json", _record(place, sample))):
        member = tarfile.TarInfo(f"{place:08d}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def _png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.convert("RGB").save(content, "PNG")
    return content.getvalue()


def _record(place: int, sample: Sample, **settings: Any) -> bytes:
    item = sample.item
    record: dict[str, Any] = {"index": place}
    if item.prompt is not None:
        record["prompt"] = item.prompt
    if item.label is not None:
        record["class"] = item.label
    record["id"] = item.id
    if sample.score is not None:
        record |= {"score": sample.score, "candidate": sample.candidate}
    return json.dumps(record | settings, ensure_ascii=False).encode() + b"\n"
