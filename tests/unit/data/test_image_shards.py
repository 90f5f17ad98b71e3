"""Reading webdataset image tars, whole and torn."""

import json
import logging
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from megarq.data.image_shards import BadSamples, ImageIndex, ImageSample, read_samples, split_name
from megarq.errors import DataError

MakeTar = Callable[[str, Mapping[str, bytes]], str]


def read(shard: str, max_rate: float = 0.5) -> list[ImageSample]:
    return list(read_samples(shard, BadSamples(max_rate)))


def test_members_of_one_key_are_one_sample(make_tar: MakeTar) -> None:
    shard = make_tar("a.tar", {"x.jpg": b"IMG", "x.txt": b"a cat\n", "x.cls": b"3", "y.PNG": b"IMG2", "y.other": b"?"})
    assert read(shard) == [
        ImageSample("x", b"IMG", ["a cat"], 3, shard),
        ImageSample("y", b"IMG2", [], None, shard),
    ]


@pytest.mark.parametrize(
    ("members", "captions"),
    [
        ({"txt": b"one"}, ["one"]),
        ({"txt": b"one", "json": b'{"captions": ["two", " three ", ""]}'}, ["two", "three"]),
        ({"json": b'{"caption": "four"}'}, ["four"]),
        ({"txt": b"one", "json": b'{"caption": "four"}'}, ["one"]),
        ({"json": b'{"caption": null, "width": 3}'}, []),
        ({"txt": b"  \n"}, []),
        ({"txt": "Füchse".encode()}, ["Füchse"]),
    ],
)
def test_captions_come_from_text_or_json(make_tar: MakeTar, members: dict[str, bytes], captions: list[str]) -> None:
    shard = make_tar("a.tar", {"k.webp": b"I"} | {f"k.{name}": data for name, data in members.items()})
    assert read(shard)[0].captions == captions


def test_names_split_at_the_first_dot_of_their_last_part() -> None:
    assert split_name("v1.0/n01.a.JPEG") == ("v1.0/n01", "a.jpeg")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"k.txt": b"only text"}, "no image member"),
        ({"k.jpg": b"I", "k.json": b"{"}, "unreadable caption"),
        ({"k.jpg": b"I", "k.json": b"[1]"}, "not an object"),
        ({"k.jpg": b"I", "k.json": b'{"captions": [1]}'}, "not a list of strings"),
        ({"k.jpg": b"I", "k.txt": b"\xff\xfe"}, "unreadable caption"),
        ({"k.jpg": b"I", "k.cls": b"cat"}, "unreadable caption or class"),
        ({"k.jpg": b"I", "k.cls": b"-1"}, "negative"),
    ],
)
def test_a_bad_sample_is_logged_counted_and_skipped(
    make_tar: MakeTar, caplog: pytest.LogCaptureFixture, members: dict[str, bytes], reason: str
) -> None:
    shard, bad = make_tar("a.tar", members | {"good.jpg": b"I"}), BadSamples(0.5)
    with caplog.at_level(logging.WARNING):
        samples = list(read_samples(shard, bad))
    assert [sample.key for sample in samples] == ["good"] and (bad.bad, bad.seen) == (1, 2)
    assert f"skipped k in {shard}" in caplog.text and reason in caplog.text


def test_too_many_bad_samples_stop_the_run() -> None:
    bad = BadSamples(0.01)
    bad.count_seen(2000)
    for _ in range(20):
        bad.skip("a.tar", "k", "broken")
    with pytest.raises(DataError, match=r"21 bad samples of 2000 seen, above the accepted rate of 0.01.*a\.tar"):
        bad.skip("a.tar", "k", "broken")


def test_early_bad_samples_are_judged_over_a_thousand() -> None:
    bad = BadSamples(0.01)
    bad.count_seen(10)
    for _ in range(10):
        bad.skip("a.tar", "k", "broken")
    with pytest.raises(DataError, match="10 bad samples of 10 seen"):
        bad.finish()


def test_rate_zero_accepts_no_bad_sample() -> None:
    with pytest.raises(DataError, match="1 bad samples"):
        BadSamples(0.0).skip("a.tar", "k", "broken")


def test_a_rate_outside_its_range_is_refused() -> None:
    with pytest.raises(DataError, match="--max-bad-rate 1"):
        BadSamples(1.0)


def torn_copy(shard: str, size: int) -> str:
    torn = shard.replace(".tar", f"-{size}.tar")
    shutil.copy(shard, torn)
    with Path(torn).open("r+b") as file:
        file.truncate(size)
    return torn


@pytest.fixture
def cut_points(image_tars: list[str]) -> dict[str, int]:
    """Sizes that tear the second tar inside and between its members."""
    with tarfile.open(image_tars[1]) as tar:
        member = tar.getmembers()[4]
    return {
        "inside data": member.offset_data + member.size // 2,
        "inside padding": member.offset_data + member.size + 1,
        "inside a header": member.offset + 100,
        "between members": member.offset,
    }


@pytest.mark.parametrize("where", ["inside data", "inside padding", "inside a header", "between members"])
def test_a_torn_tar_is_an_error_naming_shard_and_key(
    image_tars: list[str], cut_points: dict[str, int], where: str
) -> None:
    torn = torn_copy(image_tars[1], cut_points[where])
    with pytest.raises(DataError, match=rf"{Path(torn).name}' is truncated or damaged after key 's01[12]'"):
        read(torn)
    with pytest.raises(DataError, match="truncated or damaged"):
        ImageIndex([torn])


@pytest.mark.parametrize(("content", "message"), [(b"", "cannot be read"), (b"x" * 5000, "cannot be read")])
def test_a_file_that_is_no_tar_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(str(tmp_path / "a.tar"))


def test_a_missing_tar_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing shard"):
        read(str(tmp_path / "a.tar"))


def test_an_empty_tar_has_no_samples(make_tar: MakeTar) -> None:
    assert read(make_tar("a.tar", {})) == []


def test_the_index_reads_what_the_tars_hold(image_tars: list[str]) -> None:
    index = ImageIndex(image_tars)
    samples = [sample for shard in image_tars for sample in read(shard)]
    assert [index.read(i) for i in range(len(index))] == [sample.image for sample in samples]
    assert [index.name(i) for i in range(len(index))] == [(sample.shard, sample.key) for sample in samples]


def test_an_index_without_images_is_refused(make_tar: MakeTar) -> None:
    with pytest.raises(DataError, match="no images in 1 shards"):
        ImageIndex([make_tar("a.tar", {"k.json": json.dumps({}).encode()})])


def test_a_shard_that_shrinks_after_indexing_is_an_error(image_tars: list[str]) -> None:
    index = ImageIndex(image_tars)
    with Path(image_tars[2]).open("r+b") as file:
        file.truncate(600)
    with pytest.raises(DataError, match="shrank"):
        index.read(len(index) - 1)
