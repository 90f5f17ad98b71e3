"""Where the files of a picture collection lie: in a folder, a zip that is read in place and never unpacked, or an LMDB.

Names are paths below the root, with "/". A name is looked up in the listing alone, so that none from a table, a JSON
or an archive leads out of the collection.
"""

import os
import posixpath
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from megarq.data.image_shards import IMAGE_EXTENSIONS
from megarq.data.lmdb_images import ImageLmdb, is_lmdb
from megarq.errors import DataError


class ImageStore(Protocol):
    """The files of a collection."""

    path: Path
    """The folder, zip or database."""
    files: list[str]
    """Names of all files, sorted; hidden ones are left out."""
    folders: list[str]
    """Names of the folders at the root, sorted."""
    lost: int
    """Files that cannot be listed, where a part of an LMDB is damaged."""

    def read(self, name: str) -> bytes:
        """The content of a listed file. Raises: OSError where it cannot be read."""
        ...


def open_store(path: Path) -> ImageStore:
    """The collection at a path. Raises: DataError where it is neither a folder nor a zip nor an LMDB."""
    if is_lmdb(path):
        return ImageLmdb(path)
    if path.is_dir():
        return ImageFolder(path)
    if path.is_file() and zipfile.is_zipfile(path):
        return ImageZip(path)
    raise DataError(
        f"--images {path} is no folder and no zip file. Give the folder, the zip or the LMDB of the pictures."
    )


def is_image(name: str) -> bool:
    """Whether a file's name is one of a picture."""
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


class ImageFolder:
    """The files below a folder; links to folders are followed."""

    lost = 0

    def __init__(self, path: Path) -> None:
        """List the folder. Raises: OSError where a part of it cannot be listed."""
        self.path = path
        self.files = sorted(files_below(str(path)))
        self.folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not _hidden(entry.name))

    def read(self, name: str) -> bytes:
        """The content of a listed file. Raises: OSError where it cannot be read."""
        return (self.path / name).read_bytes()


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def files_below(root: str) -> Iterator[str]:
    """Names of all files below a folder, in no order; hidden ones are left out, links to folders followed."""

    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not _hidden(name) and not _is_loop(os.path.join(folder, name))]  # noqa: PTH118
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in files:
            if not _hidden(name):
                yield name if below == "." else f"{below}/{name}"


def _is_loop(folder: str) -> bool:
    """Whether a folder is a link to one that it lies in."""
    path = Path(folder)
    return path.is_symlink() and path.resolve() in path.parent.resolve().joinpath("*").parents


class ImageZip:
    """The files of a zip. Where all lie in one folder, such as train2014/, that folder is the root."""

    lost = 0

    def __init__(self, path: Path) -> None:
        """List the archive. Raises: DataError where it is damaged, or holds names that lead out of it."""
        self.path = path
        self._zip, self._owner = _open_zip(path), os.getpid()
        names = sorted(info.filename for info in self._zip.infolist() if not info.is_dir())
        names = [name for name in names if not any(_hidden(part) for part in name.split("/") if part != "..")]
        outside = [name for name in names if name.startswith("/") or ".." in name.split("/")]
        if outside:
            raise DataError(f"{path} holds {outside[0]!r}, a name that leads out of it. Make the zip again without it.")
        root = posixpath.commonpath([posixpath.dirname(name) for name in (names[0], names[-1])]) if names else ""
        self._root = f"{root}/" if root else ""
        self.files = [name.removeprefix(self._root) for name in names]
        self.folders = sorted({name.partition("/")[0] for name in self.files if "/" in name})

    def read(self, name: str) -> bytes:
        """The content of a listed file. Raises: OSError where it is damaged, encrypted or oddly compressed."""
        if self._owner != os.getpid():  # a forked process shares the position in its parent's file
            self._zip, self._owner = _open_zip(self.path), os.getpid()
        try:
            return self._zip.read(self._root + name)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, KeyError) as error:
            raise OSError(str(error)) from error


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path} cannot be read as a zip file ({error}). Copy or download it again.") from error
