"""Where training's pictures come from: tars, folders and LMDB behind one small face, so that the loader knows none.

    'shards/{00000..00331}.tar', shards/    webdataset tars (`image_shards`)
    imagenet/train, images1024x1024         a folder of pictures at any depth; class folders, as torchvision's ImageNet
    church_outdoor_train_lmdb               a folder with a data.mdb, as LSUN's (`lmdb_images`)

A picture is a number below len(source). What stands at a number follows from names alone, sorted, so every rank, worker
and restart numbers alike.
"""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Protocol

from megarq.data.faults import Faults
from megarq.data.files import check_holds_pictures, expand_shards
from megarq.data.image_shards import IMAGE_EXTENSIONS, ImageIndex
from megarq.data.image_stores import files_below, is_image
from megarq.data.lmdb_images import LmdbImages, is_lmdb
from megarq.data.packed import PackedBytes
from megarq.data.sources import is_local
from megarq.errors import DataError


class ImageSource(Protocol):
    """Numbered pictures, not yet decoded, read in any order by any process."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> tuple[str, str]:
        """(shard, folder or database, name in it) of a picture, for messages."""
        ...

    def read(self, index: int) -> bytes:
        """The encoded picture. Raises: OSError where this one cannot be read, DataError where the source is gone."""
        ...

    def fingerprint(self) -> str:
        """sha256 of what stands at which number, by name: where it is equal, ranks number alike."""
        ...


def open_images(patterns: Sequence[str], max_bad_rate: float = 0.01) -> ImageSource:
    """The pictures that --data names, in the order given; a thing named twice counts once.

    Raises: DataError for what is missing, holds no picture, or has more faults in its headers than `max_bad_rate`.
    """
    faults = Faults(max_bad_rate, setting="data.max_bad_rate")
    sources: list[ImageSource] = []
    for kind, group in groupby(dict.fromkeys(patterns), _kind):
        if kind == "shards":
            sources.append(ImageIndex(expand_shards(list(group)), faults))
        elif kind == "lmdb":
            sources += [_open_lmdb(path, faults) for path in group]
        else:
            sources += map(FolderImages, group)
    if not sources:
        raise DataError("no pictures given. Name image shards, folders of pictures or an LMDB.")
    faults.finish()
    return sources[0] if len(sources) == 1 else _Joined(sources)


def _kind(pattern: str) -> str:
    """What a pattern of --data names. A folder that holds tars is one of shards, unless it has both train and val."""
    path = Path(pattern)
    if is_local(pattern) and is_lmdb(path):
        return "lmdb"
    check_holds_pictures(pattern)
    return "folder" if path.is_dir() and (_is_split(path) or not any(path.glob("*.tar"))) else "shards"


def _is_split(folder: Path) -> bool:
    return (folder / "train").is_dir() and (folder / "val").is_dir()


def _open_lmdb(path: str, faults: Faults) -> LmdbImages:
    images = LmdbImages(path)
    faults.count_unlisted(path, images.lost)
    faults.count_seen(len(images))
    return images


class FolderImages:
    """The pictures below a folder, sorted by path; links to folders are followed, hidden files are left out."""

    def __init__(self, path: str | Path) -> None:
        """List the folder. Raises: DataError where it holds no pictures, or both `train` and `val`."""
        self.path = Path(path)
        if _is_split(self.path):
            raise DataError(f"{path} holds the folders train and val. Give one of them: {self.path / 'train'}.")
        self._names = PackedBytes.of(sorted(os.fsencode(name) for name in files_below(str(path)) if is_image(name)))
        if not len(self._names):
            endings = ", ".join("." + name for name in IMAGE_EXTENSIONS)
            raise DataError(f"no pictures below {path}: nothing there ends in {endings}. Check the path.")

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> tuple[str, str]:
        """(folder, path below it) of a picture."""
        return str(self.path), self._names[index].decode(errors="backslashreplace")

    def read(self, index: int) -> bytes:
        """The encoded picture. Raises: OSError where the file cannot be read."""
        return (self.path / os.fsdecode(self._names[index])).read_bytes()

    def fingerprint(self) -> str:
        """sha256 of the paths below the folder."""
        return self._names.fingerprint()


class _Joined:
    """Several sources, one after another."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self._sources = sources
        self._ends = list(accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> tuple[str, str]:
        source, place = self._place(index)
        return source.name(place)

    def read(self, index: int) -> bytes:
        source, place = self._place(index)
        return source.read(place)

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(source.fingerprint() for source in self._sources).encode()).hexdigest()

    def _place(self, index: int) -> tuple[ImageSource, int]:
        number = bisect_right(self._ends, index)
        return self._sources[number], index - (self._ends[number - 1] if number else 0)
