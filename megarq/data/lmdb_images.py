"""Pictures in LMDB, as LSUN publishes them: `church_outdoor_train_lmdb/data.mdb`, encoded files by key.

The environment is opened for reading alone, without locks or read-ahead: nothing is written to the database, and it may
lie on a read-only or network disk. Reading all keys of millions of pictures takes a while on a spinning disk, so they
are kept beside the database in `data.mdb.megarq-keys.npz`, and read again when the database has changed.
"""

import logging
import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np

from megarq.data.packed import PackedBytes
from megarq.errors import DataError

DATABASE = "data.mdb"
KEYS = ".megarq-keys.npz"
"""What the file of a database's keys has behind the database's name."""

logger = logging.getLogger(__name__)


def is_lmdb(path: Path) -> bool:
    """Whether a path is an LMDB's file, or the folder of one."""
    return path.suffix == Path(DATABASE).suffix or (path / DATABASE).exists()


class LmdbImages:
    """The pictures of one database, in the order of their keys."""

    def __init__(self, path: str | Path) -> None:
        """path: the folder of a data.mdb, or the file itself.

        Raises: DataError where it is missing, cut off, no LMDB or empty, or where the package lmdb is not installed.
        """
        path = Path(path)
        self._file = path / DATABASE if path.is_dir() else path
        self._environment: _Environment | None = None  # each process opens its own when it first reads
        environment = _Environment.of(self._file)
        self._keys = _keys(environment)
        if not len(self._keys):
            raise DataError(f"{self._file} is an empty database: no key is in it. Copy or download it again.")
        self.lost = environment.entries - len(self._keys)
        """Pictures whose keys damaged pages hide."""

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, index: int) -> tuple[str, str]:
        """(database, key) of a picture."""
        return str(self._file), self._keys[index].decode(errors="backslashreplace")

    def read(self, index: int) -> bytes:
        """The encoded picture.

        Raises: OSError where its page is damaged, DataError where the database has changed since it was opened.
        """
        if self._environment is None or self._environment.owner != os.getpid():
            self._environment = _Environment.of(self._file)
        key = self._keys[index]
        with _lmdb_errors(self._file, OSError), self._environment.begin() as transaction:
            value = transaction.get(key)
        if value is None:
            raise DataError(f"{self._file} lost the key {key!a} while it was in use. Leave it alone; start again.")
        return bytes(value)

    def fingerprint(self) -> str:
        """sha256 of the keys."""
        return self._keys.fingerprint()


class ImageLmdb:
    """The same as an `ImageStore`, to be packed: a picture is named by its key and the first sound one's format."""

    def __init__(self, path: Path) -> None:
        """Raises: DataError as LmdbImages does."""
        self.path = path
        self._images = LmdbImages(path)
        ending = _ending(self._images)
        self._places = {f"{self._images.name(index)[1]}{ending}": index for index in range(len(self._images))}
        self.files, self.lost = sorted(self._places), self._images.lost
        self.folders: list[str] = []

    def read(self, name: str) -> bytes:
        """The content of a listed picture. Raises: OSError where it cannot be read."""
        try:
            return self._images.read(self._places[name])
        except DataError as error:
            raise OSError(str(error)) from error


def _ending(images: LmdbImages) -> str:
    """That of files in the format of the first picture that can be read."""
    for index in range(len(images)):
        with suppress(OSError):
            first = images.read(index)
            return ".webp" if first[:4] == b"RIFF" else ".png" if first[1:4] == b"PNG" else ".jpg"
    raise DataError(f"no picture of {images.name(0)[0]} can be read. Copy or download it again.")


class _Environment:
    """A process's view of a database, for reading. LMDB allows no second one, so all who read it share it."""

    _of_this_process: ClassVar[WeakValueDictionary[Path, "_Environment"]] = WeakValueDictionary()
    _lock: ClassVar[Lock] = Lock()  # of threads that read pictures together

    def __init__(self, file: Path) -> None:
        self.file, self.owner = file, os.getpid()
        self._environment = _open(file)
        stat = file.stat()
        self.entries: int = self._environment.stat()["entries"]
        """Pictures in it."""
        self.state = [self._environment.info()["last_txnid"], self.entries, stat.st_size, stat.st_mtime_ns]
        """Numbers that change when the database does."""

    @classmethod
    def of(cls, file: Path) -> "_Environment":
        """This process's; one that came through a fork is closed and opened anew. Raises: DataError."""
        file = file.resolve()
        with cls._lock:
            found = cls._of_this_process.get(file)
            if found is None or found.owner != os.getpid():
                if found is not None:
                    found._environment.close()
                found = cls._of_this_process[file] = cls(file)
            return found

    def begin(self) -> Any:
        """A transaction; after an error of LMDB it answers nothing more."""
        return self._environment.begin()


def _open(file: Path) -> Any:
    """Raises: DataError."""
    try:
        import lmdb
    except ImportError as error:
        raise DataError(f"{file} is an LMDB, and the package lmdb is not installed. Run `pip install lmdb`.") from error
    if not file.is_file() or not file.stat().st_size:
        raise DataError(f"{file} is {'empty' if file.is_file() else 'missing'}. Copy or download the database again.")
    with _lmdb_errors(file):
        environment = lmdb.open(
            str(file), subdir=False, readonly=True, lock=False, readahead=False, meminit=False, max_readers=1
        )
    size, whole = file.stat().st_size, (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if size < whole:  # to read a page beyond the end is a bus error, not an exception
        environment.close()
        raise DataError(f"{file} is cut off: it has {size} bytes of {whole}. Copy or download it again.")
    return environment


@contextmanager
def _lmdb_errors(file: Path, raised: type[Exception] = DataError) -> Iterator[None]:
    """LMDB's errors as others."""
    import lmdb

    try:
        yield
    except lmdb.Error as error:
        raise raised(f"{file} cannot be read as an LMDB ({error}). Copy or download it again.") from error


def _keys(environment: _Environment) -> PackedBytes:
    """All keys, sorted as LMDB sorts them; from the cache beside the database where it is of this state of it."""
    cache = environment.file.with_name(environment.file.name + KEYS)
    try:
        with np.load(cache, allow_pickle=False) as stored:
            if stored["state"].tolist() == environment.state:
                return PackedBytes(stored["data"], stored["ends"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # none, or a torn one
    keys = PackedBytes.of(_listed(environment))
    _keep(cache, environment.state, keys)
    return keys


def _listed(environment: _Environment) -> list[bytes]:
    """All keys in order; where pages are damaged, those before the first such page and those behind the last."""
    ahead, error = _walk(environment, "iternext")
    if error is None:
        return ahead
    back, _ = _walk(environment, "iterprev")
    if not ahead and not back:
        raise error
    logger.warning(
        "%d of %d pictures cannot be listed: %s",
        environment.entries - len(ahead) - len(back),
        environment.entries,
        error,
    )
    return ahead + back[::-1]


def _walk(environment: _Environment, step: str) -> tuple[list[bytes], DataError | None]:
    """The keys that a cursor passes, and what stopped it before the end."""
    keys: list[bytes] = []
    try:
        with _lmdb_errors(environment.file), environment.begin() as transaction:
            keys.extend(getattr(transaction.cursor(), step)(keys=True, values=False))  # keeps what came
    except DataError as error:
        return keys, error
    return keys, None


def _keep(cache: Path, state: list[int], keys: PackedBytes) -> None:
    """Write the cache whole, under a name of its own until then: every rank of a run may be at it."""
    try:
        number, temporary = tempfile.mkstemp(prefix=f".{cache.name}.", dir=cache.parent)
        try:
            with os.fdopen(number, "wb") as target:
                np.savez(target, state=state, data=keys.data, ends=keys.ends)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(cache)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        logger.info("%s cannot be written (%s): the keys will be read again at the next start", cache, error)
