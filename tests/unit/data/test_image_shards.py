"""Reading webdataset image tars: whole and torn, near and far."""

import gzip
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from flaky_server import FlakyServer

from megarq.data.faults import Faults
from megarq.data.image_shards import ImageIndex, ImageSample, read_samples, split_name
from megarq.data.sources import Retry
from megarq.errors import DataError

MakeTar = Callable[[str, Mapping[str, bytes]], str]
QUICK = Retry(attempts=6, wait=lambda seconds: None)


def read(shard: str, caption_field: str | None = None, **faults: int) -> list[ImageSample]:
    """The samples of a shard, which has these faults."""
    counted = Faults(0.5)
    samples = list(read_samples(shard, counted, caption_field, retry=QUICK))
    assert counted.counts == Counter({kind.replace("_", " "): count for kind, count in faults.items()})
    assert counted.seen == len(samples) + counted.skipped
    return samples


def keys(samples: list[ImageSample]) -> list[str]:
    return [sample.key for sample in samples]


# Samples


def test_members_of_one_key_are_one_sample(make_tar: MakeTar) -> None:
    shard = make_tar("a.tar", {"x.jpg": b"IMG", "x.txt": b"a cat\n", "x.cls": b"3", "y.PNG": b"IMG2", "y.other": b"?"})
    assert read(shard, no_caption=1) == [
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
        ({"txt": "Füchse".encode("utf-8-sig")}, ["Füchse"]),
    ],
)
def test_captions_come_from_text_or_json(make_tar: MakeTar, members: dict[str, bytes], captions: list[str]) -> None:
    shard = make_tar("a.tar", {"k.webp": b"I"} | {f"k.{name}": data for name, data in members.items()})
    assert read(shard)[0].captions == captions


def test_the_caption_field_is_chosen(make_tar: MakeTar) -> None:
    records = [{"alt_text": "a fox"}, {"alt_text": ["a", "b"]}, {"alt_text": None}, {"caption": "other"}, None]
    members = {}
    for number, record in enumerate(records):
        members |= {f"{number}.jpg": b"I", f"{number}.txt": b"text"}
        members |= {f"{number}.json": json.dumps(record).encode()} if record else {}
    samples = read(make_tar("a.tar", members), "alt_text", no_caption=3)
    assert [sample.captions for sample in samples] == [["a fox"], ["a", "b"], [], [], []]


def test_names_split_at_the_first_dot_of_their_last_part() -> None:
    assert split_name("v1.0/n01.a.JPEG") == ("v1.0/n01", "a.jpeg")


def test_members_that_no_sample_holds_are_passed_over(tmp_path: Path) -> None:
    long, unsafe = "f/" * 80 + "long", "../../escaped"
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}) as tar:
        for name in ("folder", ".jpg", "no-extension", f"{long}.jpg", "k.npy", f"{unsafe}.jpg", "b\udcffd.jpg"):
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if name == "folder" else tarfile.REGTYPE
            tar.addfile(member)
    samples = read(str(tmp_path / "a.tar"))
    assert keys(samples) == [long, unsafe, "b\\xffd"] and not (tmp_path.parent.parent / "escaped.jpg").exists()


# Faults


@pytest.mark.parametrize(
    ("members", "kind", "reason"),
    [
        ({"k.txt": b"only text"}, "no image", "none of .jpg"),
        ({"k.jpg": b"I", "k.json": b"{"}, "unreadable text", "Expecting property name"),
        ({"k.jpg": b"I", "k.json": b"[" * 100_000}, "unreadable text", "recursion"),
        ({"k.jpg": b"I", "k.json": b"[1]"}, "unreadable text", "not an object"),
        ({"k.jpg": b"I", "k.json": b'{"captions": [1]}'}, "unreadable text", "neither a string nor a list"),
        ({"k.jpg": b"I", "k.json": rb'{"caption": "\ud800"}'}, "unreadable text", "surrogates not allowed"),
        ({"k.jpg": b"I", "k.txt": b"\xff\xfe"}, "unreadable text", "can't decode"),
        ({"k.jpg": b"I", "k.cls": b"cat"}, "unreadable text", "invalid literal"),
        ({"k.jpg": b"I", "k.cls": b"-1"}, "unreadable text", "negative"),
        ({"good.png": b"again"}, "duplicate key", "an earlier sample"),
    ],
)
def test_a_bad_sample_is_logged_counted_and_skipped(
    make_tar: MakeTar, caplog: pytest.LogCaptureFixture, members: dict[str, bytes], kind: str, reason: str
) -> None:
    shard = make_tar("a.tar", {"good.jpg": b"I", "other.jpg": b"I"} | members)
    assert keys(read(shard, **{kind.replace(" ", "_"): 1})) == ["good", "other"]
    assert f"in {shard}: {kind}: " in caplog.text and reason in caplog.text


def test_an_empty_tar_is_noted(make_tar: MakeTar) -> None:
    assert read(make_tar("a.tar", {}), empty_shard=1) == []


def cut(shard: str, where: str) -> str:
    """Tear a tar inside or between its members; its fifth member is the first of sample s012."""
    with tarfile.open(shard) as tar:
        member = tar.getmembers()[4]
    sizes = {
        "to nothing": 0,
        "in the first header": 100,
        "inside data": member.offset_data + member.size // 2,
        "inside padding": member.offset_data + member.size + 1,
        "inside a header": member.offset + 100,
        "between samples": member.offset,
    }
    with Path(shard).open("r+b") as file:
        if where == "not at all, but damaged":
            file.seek(member.offset + 10)
            file.write(b"damage")
        else:
            file.truncate(sizes[where])
    return shard


@pytest.mark.parametrize(
    ("where", "last"),
    [
        ("to nothing", "the first sample"),
        ("in the first header", "the first sample"),
        ("inside data", "s012"),
        ("inside padding", "s012"),
        ("inside a header", "s011"),
        ("between samples", "s011"),
        ("not at all, but damaged", "s011"),
    ],
)
def test_the_whole_samples_of_a_torn_tar_are_used(
    image_tars: list[str], caplog: pytest.LogCaptureFixture, where: str, last: str
) -> None:
    torn = cut(image_tars[1], where)
    used = {"the first sample": [], "s011": ["s010"], "s012": ["s010", "s011"]}[last]
    assert keys(read(torn, truncated_shard=1)) == used
    assert f"skipped {last} in {torn}: truncated shard: the tar is torn" in caplog.text
    faults = Faults(0.5)
    index = ImageIndex([image_tars[0], torn], faults)
    assert len(index) == 10 + len(used) and faults.counts == {"truncated shard": 1}


@pytest.mark.parametrize("content", [b"x" * 5000, gzip.compress(bytes(range(256)) * 9)])
def test_a_file_that_is_no_tar_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content.ljust(2000, b"x"))
    with pytest.raises(DataError, match=r"is no uncompressed tar .*pipe:gzip -dc"):
        read(str(tmp_path / "a.tar"))


def test_a_missing_tar_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing shard"):
        read(str(tmp_path / "a.tar"))


# Sources that fail


@pytest.fixture
def far(server: FlakyServer, image_tars: list[str]) -> tuple[str, list[str]]:
    """The address of a tar, and its keys."""
    server.files["/a.tar"] = Path(image_tars[0]).read_bytes()
    return f"{server.address}/a.tar", [f"s{number:03d}" for number in range(10)]


@pytest.mark.parametrize("script", [[], [503, "drop", 429, "drop"], ["short", "drop"], [503, 503, 503]])
def test_a_flaky_source_loses_and_doubles_nothing(
    server: FlakyServer, far: tuple[str, list[str]], caplog: pytest.LogCaptureFixture, script: list[int | str]
) -> None:
    server.script = list(script)
    assert keys(read(far[0])) == far[1]
    assert len(server.requests) == len(script) + 1 == len(caplog.records) + 1


def test_a_source_out_of_order_is_an_error_after_the_last_attempt(
    server: FlakyServer, far: tuple[str, list[str]]
) -> None:
    server.script = [503] * 9
    with pytest.raises(DataError, match=r"failed 6 times in a row .*503"):
        read(far[0])
    assert len(server.requests) == 6


def test_a_missing_address_is_asked_for_once(server: FlakyServer) -> None:
    with pytest.raises(DataError, match="missing shard"):
        read(f"{server.address}/none.tar")
    assert len(server.requests) == 1


def test_a_far_tar_that_stays_torn_is_a_fault(server: FlakyServer, far: tuple[str, list[str]]) -> None:
    server.script = ["short"] * 9
    whole = read(far[0], truncated_shard=1)
    assert 0 < len(whole) < 10 and keys(whole) == far[1][: len(whole)] and len(server.requests) == 6


def test_only_failures_without_a_sample_between_them_use_up_the_attempts(image_tars: list[str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    command = f"pipe:printf x >> {runs}; n=$(wc -c < {runs}); head -c $((n * 10240)) {image_tars[0]}; [ $n = 3 ]"
    assert len(list(read_samples(command, Faults(), retry=Retry(2, wait=lambda seconds: None)))) == 10
    assert runs.read_text() == "xxx"


def test_a_command_that_fails_after_the_last_sample_is_an_error(image_tars: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"failed 6 times in a row \(last: OSError: exit status 1: .*none.tar"):
        read(f"pipe:cat {image_tars[0]} {tmp_path}/none.tar")


# The index


def test_the_index_reads_what_the_tars_hold(image_tars: list[str]) -> None:
    index = ImageIndex(image_tars, Faults())
    samples = [sample for shard in image_tars for sample in read(shard)]
    assert [index.read(i) for i in range(len(index))] == [sample.image for sample in samples]
    assert [index.name(i) for i in range(len(index))] == [(sample.shard, sample.key) for sample in samples]


@pytest.mark.parametrize("source", ["pipe:cat a.tar", "s3://bucket/a.tar"])
def test_an_index_is_of_local_tars(source: str) -> None:
    with pytest.raises(DataError, match="cannot be read in any order"):
        ImageIndex([source], Faults())


def test_an_index_without_images_is_refused(make_tar: MakeTar) -> None:
    with pytest.raises(DataError, match="no images in 1 shards"):
        ImageIndex([make_tar("a.tar", {"k.json": b"{}"})], Faults())


def test_a_shard_that_shrinks_after_indexing_is_an_error(image_tars: list[str]) -> None:
    index = ImageIndex(image_tars, Faults())
    with Path(image_tars[2]).open("r+b") as file:
        file.truncate(600)
    with pytest.raises(DataError, match="shrank"):
        index.read(len(index) - 1)
