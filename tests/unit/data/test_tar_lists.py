"""Samples of tars as ranges of bytes: which there are, what is copied, what is a fault."""

import io
import tarfile
from pathlib import Path

import pytest

from megarq.data.faults import Faults
from megarq.data.tar_lists import TarList
from megarq.errors import DataError

LONG = "folder/" + "k" * 120


def members(samples: TarList, index: int) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(samples.packed(index) + bytes(1024))) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_a_sample_is_copied_with_all_that_is_said_of_it(make_tar):
    wanted = [
        {"a.jpg": b"1" * 600, "a.txt": b"caption", "a.json": b'{"url": "http://x", "similarity": 0.3}'},
        {f"{LONG}.png": b"2", f"{LONG}.cls": b"7"},
        {"ü.webp": b"", "ü.txt": "schön".encode()},
    ]
    samples = TarList([make_tar("0.tar", wanted[0] | wanted[1]), make_tar("1.tar", wanted[2])], Faults())
    assert [members(samples, index) for index in range(len(samples))] == wanted
    assert [samples.key(index) for index in range(len(samples))] == ["a", LONG, "ü"]


def test_a_key_of_an_earlier_shard_is_a_fault(make_tar, caplog):
    shards = [make_tar("0.tar", {"a.jpg": b"1"}), make_tar("1.tar", {"a.jpg": b"2", "b.jpg": b"3"})]
    faults = Faults(0.5)
    samples = TarList(shards, faults)
    assert [members(samples, index) for index in range(len(samples))] == [{"a.jpg": b"1"}, {"b.jpg": b"3"}]
    assert faults.counts == {"duplicate key": 1} and "skipped a in" in caplog.text and "1.tar" in caplog.text


def test_a_torn_tar_gives_its_whole_samples(make_tar):
    shard = make_tar("0.tar", {"a.jpg": b"1", "b.jpg": b"2" * 5000, "c.jpg": b"3"})
    Path(shard).write_bytes(Path(shard).read_bytes()[:4000])
    faults = Faults(0.5)
    samples = TarList([shard], faults, workers=1)
    assert [samples.key(index) for index in range(len(samples))] == ["a"]
    assert faults.counts == {"truncated shard": 1} and faults.seen == 2


def test_samples_without_an_image_and_empty_tars_are_counted(make_tar):
    shards = [make_tar("0.tar", {"a.txt": b"no picture", "b.jpg": b"2"}), make_tar("1.tar", {})]
    faults = Faults(0.5)
    assert len(TarList(shards, faults)) == 1
    assert faults.counts == {"no image": 1, "empty shard": 1}


def test_the_fingerprint_tells_lists_apart(make_tar):
    made = [make_tar(f"{number}.tar", {f"{key}.jpg": b"1"}) for number, key in enumerate("ab")]
    assert TarList(made, Faults()).fingerprint() == TarList(made, Faults()).fingerprint()
    assert len({TarList(shards, Faults()).fingerprint() for shards in (made, made[::-1], made[:1])}) == 3


def test_a_list_without_images_is_refused(make_tar):
    with pytest.raises(DataError, match="no images in 1 shards"):
        TarList([make_tar("0.tar", {})], Faults())


def test_a_source_that_is_not_local_is_refused():
    with pytest.raises(DataError, match="Copy it to a local disk first"):
        TarList(["pipe:cat 0.tar"], Faults())


def test_a_shard_that_shrank_is_unreadable(make_tar):
    shard = make_tar("0.tar", {"a.jpg": b"1" * 5000})
    samples = TarList([shard], Faults())
    Path(shard).write_bytes(b"")
    with pytest.raises(OSError, match="shrank"):
        samples.packed(0)
