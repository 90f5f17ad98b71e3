"""Pictures to be looked at in order: a folder of image files, image shards, an LMDB, or a picture set that was drawn.

    images/a.png images/b/c.jpg ..        every image file below the folder, sorted by full path
    church_outdoor_val_lmdb/data.mdb      an LMDB, in the order of its keys
    'shards/{00000..00009}.tar'           image shards as they come; prompt: the first caption
    SET/pictures.json SET/000000.tar ..   a whole set of drawn pictures (or .png); prompt: `prompt` of each .json
pictures[i] -> Picture(data=encoded bytes, prompt=text or None, name) ; PixelStream -> uint8 [B, 3, H, W], B at a time
"""

import hashlib
import io
import json
import os
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megarq.data.faults import Faults, TooManyFaultsError
from megarq.data.files import check_holds_pictures, expand_shards
from megarq.data.image_shards import IMAGE_EXTENSIONS, LOSSY_EXTENSIONS, scan_samples
from megarq.data.lmdb_images import LmdbImages, is_lmdb
from megarq.data.picture_set import PICTURES, PictureSettings
from megarq.data.sources import failure
from megarq.data.transforms import decode_rgb, find_transform, unreadable
from megarq.errors import DataError
from megarq.progress import progress_bar

_TEXTS = ("json", "txt")


@dataclass(frozen=True)
class Picture:
    """One picture, not yet decoded."""

    data: bytes
    """The encoded picture."""
    prompt: str | None
    """What it should show, if that is known."""
    name: str
    """Its path, or its shard and key."""


@dataclass(frozen=True)
class Pictures:
    """A list of pictures whose items are read when they are asked for."""

    source: str
    """As it was given."""
    kind: Literal["folder", "shards", "lmdb", "set", "several"]
    """What it is."""
    count: int
    """How many."""
    read: Callable[[int], Picture]
    """The n-th of them."""
    settings: dict[str, Any] | None = None
    """What pictures.json of a set says."""
    lossy: bool = False
    """Some are JPEG or WebP files."""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Picture:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.read(index)


def open_pictures(*sources: str | Path) -> Pictures:
    """List the pictures of folders, image shards, LMDB or sets, one source after another.

    Raises: DataError where one has none, for a torn shard or LMDB, and for a set that is not whole.
    """
    parts = [_open(str(source)) for source in sources]
    if len(parts) == 1:
        return parts[0]
    ends = list(accumulate(map(len, parts)))

    def read(index: int) -> Picture:
        number = bisect_right(ends, index)
        return parts[number][index - ends[number] + len(parts[number])]

    lossy = any(part.lossy for part in parts)
    return Pictures(" ".join(map(str, sources)), "several", ends[-1], read, lossy=lossy)


def _open(source: str) -> Pictures:
    folder = Path(source)
    if (folder / PICTURES).is_file():
        return _open_set(folder)
    if is_lmdb(folder):
        return _open_lmdb(source)
    if folder.is_dir():
        files = _find_files(folder)
        tars = any(folder.glob("*.tar"))
        if files and tars:
            raise DataError(
                f"{source} holds image files and tars. Name the tars, as '{source}/*.tar', or move one of the two away."
            )
        if not files and not tars:
            raise DataError(
                f"no pictures in {source}: nothing in it or below it ends in "
                f"{', '.join('.' + name for name in IMAGE_EXTENSIONS)} or .tar. Check the path."
            )
        if files:
            lossy = any(name.lower().endswith(LOSSY_EXTENSIONS) for name in files)
            return Pictures(source, "folder", len(files), lambda index: _read_file(files[index]), lossy=lossy)
    check_holds_pictures(source)
    return _open_shards(source, expand_shards(source), None)


def _find_files(folder: Path) -> list[str]:
    """Image files below a folder, resolved and sorted as strings: torch-fidelity's order."""
    found = [
        os.path.realpath(os.path.join(place, name))  # noqa: PTH118
        for place, _, names in os.walk(folder)
        for name in names
        if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and "." in name
    ]
    return sorted(found)


def _read_file(name: str) -> Picture:
    try:
        return Picture(Path(name).read_bytes(), None, name)
    except OSError as error:
        raise DataError(f"picture {name} cannot be read ({error}). Check its rights, or copy it again.") from error


def _open_lmdb(source: str) -> Pictures:
    images = LmdbImages(source)
    if images.lost:
        raise DataError(
            f"{source}: damaged pages hide {images.lost} of {images.lost + len(images)} pictures: scores over a part "
            "of them are other scores. Copy or download it again."
        )

    def read(index: int) -> Picture:
        name = "/".join(images.name(index))
        try:
            return Picture(images.read(index), None, name)
        except OSError as error:
            reason = str(error).rpartition(". ")[0]
            raise DataError(f"picture {name}: {reason}. Copy or download the database again.") from error

    return Pictures(source, "lmdb", len(images), read, lossy=True)


class _Members:
    """Where the pictures of shards lie, and the texts beside them."""

    def __init__(self, shards: Sequence[str]) -> None:
        self.shards = list(shards)
        numbers, places, keys = [], [], []
        self.lossy = False
        for number, shard in enumerate(self.shards):
            faults = Faults(max_rate=0.0, grace=1)
            try:
                for key, parts in scan_samples(shard, faults, lambda _, member: (member.offset_data, member.size)):
                    image = next(extension for extension in IMAGE_EXTENSIONS if extension in parts)
                    self.lossy |= image in LOSSY_EXTENSIONS
                    none = (0, -1)
                    places.append([parts[image], *(parts.get(text, none) for text in _TEXTS)])
                    numbers.append(number)
                    keys.append(key.encode())
            except TooManyFaultsError as error:
                kinds = ", ".join(f"{count} {kind}" for kind, count in faults.counts.items())
                raise DataError(
                    f"shard {shard!r} has faults ({kinds}; named in the log): scores over a part of the pictures are "
                    "other scores. Copy or make it again."
                ) from error
        self._numbers = np.array(numbers, np.int32)
        self._places = np.array(places, np.int64).reshape(len(numbers), 1 + len(_TEXTS), 2)
        self._keys = np.array(keys)

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, index: int) -> Picture:
        """The n-th picture. Raises: DataError where its shard has gone or shrunk, or its texts cannot be read."""
        shard, key = self.shards[self._numbers[index]], self._keys[index].decode()
        try:
            with Path(shard).open("rb", buffering=0) as file:
                image, record, text = (
                    os.pread(file.fileno(), size, offset) if size >= 0 else None
                    for offset, size in self._places[index].tolist()
                )
        except OSError as error:
            raise failure(shard, error) from error
        if image is None or len(image) != self._places[index, 0, 1]:
            raise DataError(f"shard {shard!r} shrank while it was in use, at key {key!r}. Copy or make it again.")
        name = f"{shard}/{key}"
        try:
            return Picture(image, _prompt(record, text), name)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: the text beside the picture is {error}. Make the shard again.") from error


def _prompt(record: bytes | None, text: bytes | None) -> str | None:
    """`prompt` of the JSON, or its first caption, or the text."""
    fields = json.loads(record) if record is not None else {}
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON {type(fields).__name__}, not an object")
    captions = fields.get("captions")
    first = captions[0] if isinstance(captions, list) and captions else None
    plain = text.decode("utf-8-sig").strip() if text is not None else None
    given = fields.get("prompt") or first or plain or fields.get("caption")
    return given if isinstance(given, str) and given.strip() else None


def _open_shards(source: str, shards: Sequence[str], settings: dict[str, Any] | None) -> Pictures:
    members = _Members(shards)
    if not len(members) and settings is None:
        raise DataError(
            f"no pictures in {source}: its {len(shards)} tars have no member that ends in "
            f"{', '.join('.' + name for name in IMAGE_EXTENSIONS)}. Check the path."
        )
    kind: Literal["shards", "set"] = "shards" if settings is None else "set"
    return Pictures(source, kind, len(members), members.read, settings, members.lossy)


def _open_set(folder: Path) -> Pictures:
    settings, whole = PictureSettings.load(folder)
    if settings.pictures_per_tar is None:
        pictures = _open_loose(folder, asdict(settings))
    else:
        pictures = _open_shards(str(folder), sorted(map(str, folder.glob("*.tar"))), asdict(settings))
    if len(pictures) != settings.count or not whole:
        fewer = "fewer pictures than captions" if len(pictures) < settings.count else "it is not complete"
        raise DataError(
            f"{folder}: {len(pictures)} of {settings.count} pictures are there: {fewer}. Run the command that draws "
            "them again: it goes on where it stopped."
        )
    return pictures


def _open_loose(folder: Path, settings: dict[str, Any]) -> Pictures:
    """A set whose pictures are files of their own."""
    files = sorted(map(str, folder.glob("*.png")))

    def read(index: int) -> Picture:
        picture = _read_file(files[index])
        record = Path(files[index]).with_suffix(".json")
        try:
            return replace(picture, prompt=_prompt(record.read_bytes(), None))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{record} cannot be read ({error}). Remove it, and run the command that drew it."
            ) from error

    return Pictures(str(folder), "folder", len(files), read, settings)


def decode_plain(data: bytes) -> Image.Image:
    """Decode to 8-bit RGB as published evaluators do: neither turned upright nor laid on white.

    Raises: DataError where the bytes are no whole picture, or one of more than 8 bits a channel.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode}, of more than 8 bits, which evaluators clip to white")
            return image.convert("RGB")
    except Exception as error:  # damaged bytes make Pillow raise anything
        raise unreadable(data, error) from error


@dataclass(frozen=True)
class PictureBatch:
    """Decoded pictures that stand beside each other."""

    pixels: Tensor
    """uint8 [B, 3, H, W], RGB."""
    prompts: list[str | None]
    """[B]."""
    names: list[str]
    """[B]."""
    views: Tensor | None
    """[B, ...], what `view` of the stream made of each."""


class PixelStream:
    """One pass over pictures, in order, decoded by threads a little ahead: memory does not grow with their number."""

    def __init__(
        self,
        pictures: Pictures,
        batch_size: int,
        *,
        transform: str | None = None,
        resolution: int | None = None,
        view: Callable[[Image.Image], Tensor] | None = None,
        workers: int | None = None,
        progress: str = "pictures",
    ) -> None:
        """transform: a name in TRANSFORMS, to resolution x resolution; without one, pictures stay as they are.

        view: something else to make of each picture; progress: the name of the bar, "" for none.
        Raises: DataError for an unknown transform.
        """
        self._pictures, self._batch_size, self._view, self._progress = pictures, batch_size, view, progress
        self._transform = find_transform(transform) if transform else None
        self._resolution = resolution
        self._workers = workers or min(len(os.sched_getaffinity(0)), 16)
        self._sha256 = hashlib.sha256()
        self.size: tuple[int, int] | None = None
        """(width, height) of all pictures, once one has come."""

    @property
    def sha256(self) -> str:
        """Of the encoded bytes of all pictures that have come, in order."""
        return self._sha256.hexdigest()

    def __iter__(self) -> Iterator[PictureBatch]:
        """Raises: DataError for an unreadable picture, and where two have different sizes."""
        parts: list[tuple[Picture, Tensor, Tensor | None]] = []
        first = ""
        quiet = not self._progress
        with progress_bar(total=len(self._pictures), desc=self._progress, unit=" pictures", disable=quiet) as bar:
            for picture, pixels, view in self._decoded():
                size = (pixels.shape[2], pixels.shape[1])
                if self.size is None:
                    self.size, first = size, picture.name
                if size != self.size:
                    raise DataError(
                        f"pictures of two sizes: {first} is {self.size[0]}x{self.size[1]}, {picture.name} is "
                        f"{size[0]}x{size[1]}. Resize them to one size; a reference can be cropped by "
                        "--reference-transform center (score.py) or --transform center (reference_stats.py)."
                    )
                self._sha256.update(picture.data)
                parts.append((picture, pixels, view))
                bar.update()
                if len(parts) == self._batch_size:
                    yield _batch(parts)
                    parts = []
        if parts:
            yield _batch(parts)

    def _decoded(self) -> Iterator[tuple[Picture, Tensor, Tensor | None]]:
        ahead: deque[Future[tuple[Picture, Tensor, Tensor | None]]] = deque()
        with ThreadPoolExecutor(self._workers) as threads:
            try:
                for index in range(len(self._pictures)):
                    ahead.append(threads.submit(self._decode, index))
                    if len(ahead) > 4 * self._workers:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def _decode(self, index: int) -> tuple[Picture, Tensor, Tensor | None]:
        picture = self._pictures[index]
        try:
            if self._transform is None:
                image = decode_plain(picture.data)
            else:
                assert self._resolution is not None, "a transform has a resolution"
                image = self._transform(decode_rgb(picture.data), self._resolution, random.Random(index))
        except DataError as error:
            reason = str(error).rpartition(". ")[0]
            raise DataError(f"picture {picture.name}: {reason}. Replace or remove it, and score again.") from error
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()
        return picture, pixels, self._view(image) if self._view else None


def _batch(parts: Sequence[tuple[Picture, Tensor, Tensor | None]]) -> PictureBatch:
    views = [view for _, _, view in parts if view is not None]
    return PictureBatch(
        torch.stack([pixels for _, pixels, _ in parts]),
        [picture.prompt for picture, _, _ in parts],
        [picture.name for picture, _, _ in parts],
        torch.stack(views) if views else None,
    )
