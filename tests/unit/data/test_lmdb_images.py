"""LSUN's databases: keys and their cache, processes, damages, packing."""

import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megarq.data import lmdb_images
from megarq.data.faults import Fault, Faults, TooManyFaultsError
from megarq.data.image_lists import list_folder
from megarq.data.image_sources import open_images
from megarq.data.image_stores import open_store
from megarq.data.image_writer import write_image_shards
from megarq.data.images import ImageLoader
from megarq.data.lmdb_images import LmdbImages
from megarq.errors import DataError

KEYS = "data.mdb.megarq-keys.npz"
ENTRIES = {b"b" * 40: b"RIFF second", b"a" * 40: b"RIFF first", b"odd\xff\x00": b"RIFF third"}


@pytest.fixture
def database(make_lmdb: Callable[..., Path]) -> Path:
    return make_lmdb("cat", ENTRIES)


def tear(database: Path, value: bytes) -> None:
    """Spoil the head of the pages that hold a value longer than half a page, as a disk does it: without a new date."""
    path = database / "data.mdb"
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(file.read().index(value) - 16)
        file.write(b"\xff" * 16)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture
def long_database(make_lmdb: Callable[..., Path]) -> tuple[Path, list[bytes]]:
    """A database of 40 records on pages of their own, and the records."""
    values = [b"RIFF" + os.urandom(9000) for _ in range(40)]
    return make_lmdb("long", {f"{number:02d}".encode(): value for number, value in enumerate(values)}), values


def contents(images: LmdbImages) -> list[bytes]:
    return [images.read(index) for index in range(len(images))]


def test_pictures_come_in_the_order_of_their_keys(database):
    images = LmdbImages(database)
    assert contents(images) == [b"RIFF first", b"RIFF second", b"RIFF third"]
    assert images.name(0) == (str(database / "data.mdb"), "a" * 40)
    assert images.name(2)[1] == "odd\\xff\x00"


def test_the_database_is_not_written(database):
    before = (database / "data.mdb").read_bytes()
    contents(LmdbImages(database))
    assert (database / "data.mdb").read_bytes() == before
    assert sorted(path.name for path in database.iterdir()) == ["data.mdb", KEYS, "lock.mdb"]


def test_keys_are_read_once(database, monkeypatch):
    LmdbImages(database)

    def refuse(*_):
        raise AssertionError("the keys are packed again")

    monkeypatch.setattr(lmdb_images.PackedBytes, "of", refuse)
    assert len(LmdbImages(database)) == 3
    (database / KEYS).unlink()
    with pytest.raises(AssertionError):
        LmdbImages(database)


def test_keys_are_read_again_where_the_database_has_changed(database, make_lmdb):
    LmdbImages(database)
    make_lmdb("cat", {b"0": b"RIFF new"})
    assert contents(LmdbImages(database)) == [b"RIFF new", b"RIFF first", b"RIFF second", b"RIFF third"]


def test_keys_of_another_database_of_the_same_name_and_size_are_not_taken(make_lmdb, database):
    stat = (database / "data.mdb").stat()
    LmdbImages(database)
    other = make_lmdb("other", {key.replace(b"a", b"z"): value for key, value in ENTRIES.items()})
    os.utime(other / "data.mdb", ns=(stat.st_mtime_ns, stat.st_mtime_ns + 1))
    (other / "data.mdb").replace(database / "data.mdb")
    assert (database / "data.mdb").stat().st_size == stat.st_size
    assert LmdbImages(database).name(2)[1] == "z" * 40


def test_databases_of_one_folder_keep_their_keys_apart(database, make_lmdb, monkeypatch):
    (make_lmdb("other", {b"x": b"RIFF x"}) / "data.mdb").rename(database / "dog.mdb")
    for name in ("data.mdb", "dog.mdb"):
        LmdbImages(database / name)
    monkeypatch.setattr(lmdb_images.PackedBytes, "of", lambda _: pytest.fail("the keys are read again"))
    assert (len(LmdbImages(database)), len(LmdbImages(database / "dog.mdb"))) == (3, 1)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 torn", b"\x80\x04 a pickle"])
def test_a_damaged_cache_is_made_anew(database, damage):
    LmdbImages(database)
    whole = (database / KEYS).read_bytes()
    (database / KEYS).write_bytes(damage)
    assert len(contents(LmdbImages(database))) == 3
    assert len((database / KEYS).read_bytes()) == len(whole)


def test_a_folder_that_cannot_be_written_is_read(database, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(lmdb_images.tempfile, "mkstemp", refuse)
    assert len(contents(LmdbImages(database))) == 3
    assert not (database / KEYS).exists()


def test_a_forked_process_opens_its_own(database):
    images = LmdbImages(database)
    assert images.read(0) == b"RIFF first"
    ours = images._environment
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = images.read(1)
            os.write(writing, found if images._environment is not ours else b"inherited")
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        assert answer.read() == b"RIFF second"
    os.waitpid(child, 0)
    assert images.read(0) == b"RIFF first" and images._environment is ours


def test_two_readers_share_a_database(database):
    images = LmdbImages(database)
    images.read(0)
    again = LmdbImages(database.parent / "." / database.name)
    assert again.read(1) == images.read(1) == b"RIFF second"
    assert again._environment is images._environment


def test_a_database_that_is_cut_off_is_refused(make_lmdb):
    database = make_lmdb("cut", {bytes([65 + n]): os.urandom(9000) for n in range(20)}) / "data.mdb"
    whole = database.stat().st_size
    os.truncate(database, whole // 2)
    with pytest.raises(DataError, match=f"is cut off: it has {whole // 2} bytes of {whole}"):
        LmdbImages(database.parent)


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"text" * 4096, "cannot be read as an LMDB")])
def test_what_is_no_database_is_refused(tmp_path, content, message):
    (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(DataError, match=message):
        LmdbImages(tmp_path)


def test_a_missing_database_is_refused(tmp_path):
    with pytest.raises(DataError, match="data.mdb is missing"):
        LmdbImages(tmp_path)


def test_an_empty_database_is_refused(make_lmdb):
    with pytest.raises(DataError, match="is an empty database"):
        LmdbImages(make_lmdb("none", {}))


def test_the_missing_package_is_named(database, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(DataError, match="the package lmdb is not installed. Run `pip install lmdb`"):
        LmdbImages(database)


def test_a_picture_that_goes_away_stops(database, make_lmdb):
    images = LmdbImages(database)
    for file in database.iterdir():
        file.unlink()
    make_lmdb("cat", {b"other": b"RIFF"})
    with pytest.raises(DataError, match="lost the key b'aaa"):
        images.read(0)


def test_a_database_is_packed_into_shards(make_lmdb, png, tmp_path):
    store = open_store(make_lmdb("bedroom", {f"{number:040x}".encode(): png(number) for number in range(5)}))
    faults = Faults()
    samples = list_folder(store, faults)
    (shard,) = write_image_shards(samples, tmp_path / "shards", faults, samples_per_shard=10, shuffle_seed=None)
    with tarfile.open(shard) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert members == {f"{number:040x}.png": png(number) for number in range(5)}


def test_a_torn_record_is_a_broken_picture(long_database, png):
    database, values = long_database
    images = LmdbImages(database)
    tear(database, values[7])
    with pytest.raises(OSError, match="cannot be read as an LMDB"):
        images.read(7)
    assert images.read(8) == values[8]


def test_training_passes_over_a_torn_record(make_lmdb, png, caplog):
    pictures = [png(number) + bytes(9000) for number in range(8)]
    database = make_lmdb("torn", {f"{number}".encode(): picture for number, picture in enumerate(pictures)})
    source = open_images([str(database)])
    tear(database, pictures[3])
    batch = next(iter(ImageLoader(source, "none", 8, 8)))
    assert len(batch.images) == 8 and "skipped 3 in" in caplog.text and Fault.UNREADABLE_IMAGE in caplog.text


@pytest.mark.parametrize(("torn", "listed"), [([7], 39), ([0], 39), ([39], 39), ([7, 9], 37)])
def test_records_that_a_torn_page_hides_are_counted(long_database, torn, listed):
    database, values = long_database
    for place in torn:
        tear(database, values[place])
    for _ in range(2):  # the second time from the file of keys
        images = LmdbImages(database)
        assert (len(images), images.lost) == (listed, 40 - listed)
    assert contents(images) == values[: min(torn)] + values[max(torn) + 1 :]
    assert len(open_images([str(database)], max_bad_rate=0.1)) == listed
    with pytest.raises(TooManyFaultsError, match=f"{40 - listed} bad samples of 40 seen"):
        open_images([str(database)], max_bad_rate=0.01)


def test_a_database_with_a_torn_record_is_packed_without_it(long_database):
    database, values = long_database
    tear(database, values[0])
    faults = Faults(0.1)
    samples = list_folder(open_store(database), faults)
    assert (len(samples), faults.seen, faults.skipped) == (39, 40, 1) and samples.images[0].name == "01.webp"


def test_the_first_picture_that_is_whole_gives_the_format(long_database):
    database, values = long_database
    LmdbImages(database)
    tear(database, values[0])
    assert open_store(database).files[0] == "00.webp"


def test_a_database_without_a_sound_page_is_refused(make_lmdb):
    values = [b"RIFF" + bytes([number]) * 9000 for number in range(2)]
    database = make_lmdb("broken", dict(zip((b"a", b"b"), values, strict=True)))
    for value in values:
        tear(database, value)
    with pytest.raises(DataError, match="cannot be read as an LMDB"):
        LmdbImages(database)
