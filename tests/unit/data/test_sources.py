"""Files, commands and addresses as streams; what fails for a while, and what for good."""

import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from flaky_server import FlakyServer

from megarq.data.sources import Retry, SourceError, is_local, list_remote, open_source, source_name
from megarq.errors import DataError


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """fsspec's file system in memory, with two tars and a table in a folder."""
    system = fsspec.filesystem("memory")
    system.pipe({f"/shards/{name}": name.encode() for name in ("b.tar", "a.tar", "a.parquet")})
    yield system
    system.rm("/shards", recursive=True)


def read(source: str) -> bytes:
    with open_source(source) as stream:
        return stream.read()


@pytest.mark.parametrize(
    ("source", "local", "name"),
    [
        ("/data/cc3m/a.tar", True, "cc3m/a.tar"),
        ("s3://bucket/x/cc3m/a.tar", False, "cc3m/a.tar"),
        ("https://host/a.tar?signature=b/c", False, "host/a.tar?4a8c5cb1f56c"),
        ("pipe:cat x/a.tar", False, "pipe:cc5db9da19f9"),
    ],
)
def test_kinds_and_names_of_sources(source: str, local: bool, name: str) -> None:
    assert (is_local(source), source_name(source)) == (local, name)


def test_a_path_has_one_name_from_wherever_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_name("a.tar") == source_name(f"{tmp_path}/a.tar") == f"{tmp_path.name}/a.tar"


def test_every_kind_of_source_is_read(tmp_path: Path, server: FlakyServer, memory: fsspec.AbstractFileSystem) -> None:
    (tmp_path / "a.tar").write_bytes(b"a.tar")
    server.files["/a.tar"] = b"a.tar"
    for source in (f"{tmp_path}/a.tar", "pipe:printf a. && printf tar | cat", "memory://shards/a.tar"):
        assert read(source) == b"a.tar"
    assert read(f"{server.address}/a.tar?version=2") == b"a.tar" and server.requests == ["GET /a.tar?version=2"]


def test_a_failing_command_ends_in_what_it_printed() -> None:
    with open_source("pipe:printf half; echo disk on fire >&2; exit 3") as stream:
        assert stream.read(4) == b"half"
        with pytest.raises(SourceError, match="exit status 3: disk on fire"):
            stream.read(1)


@pytest.mark.timeout(30)
def test_a_command_no_longer_read_is_ended() -> None:
    with open_source("pipe:echo ab; sleep 600 | cat") as stream:
        assert stream.readline() == b"ab\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none/a.tar", "missing shard 'none/a.tar'"),
        ("/", "cannot be read .*IsADirectoryError"),
        ("memory://none/a.tar", "missing shard 'memory://none/a.tar'"),
        ("pipe:no-such-command", "missing shard .*exit status 127: .*no-such-command"),
        ("s3://bucket/a.tar", "Run pip install s3fs"),
        ("gs://bucket/a.tar", "Run pip install gcsfs"),
        ("nowhere://a.tar", "unknown kind of address"),
    ],
)
def test_lasting_failures_are_data_errors(monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=message):
        read(source)


@pytest.mark.parametrize(
    ("status", "kind"), [(404, DataError), (403, DataError), (429, SourceError), (503, SourceError)]
)
def test_answers_of_a_server_pass_or_last(server: FlakyServer, status: int, kind: type[Exception]) -> None:
    server.files["/a.tar"], server.script = b"a.tar", [status]
    with pytest.raises(kind):
        read(f"{server.address}/a.tar")


def test_a_lost_connection_may_be_tried_again(server: FlakyServer) -> None:
    server.files["/a.tar"], server.script = bytes(1000), ["drop"]
    with pytest.raises(SourceError, match="ClientPayloadError"):
        read(f"{server.address}/a.tar")


def test_waits_double_until_the_attempts_are_used_up(caplog: pytest.LogCaptureFixture) -> None:
    waits: list[float] = []
    retry, error = Retry(attempts=4, first_wait=0.5, wait=waits.append), SourceError("connection lost")
    for failures in (1, 2, 3):
        retry.after(failures, "s3://b/a.tar", error)
    assert waits == [0.5, 1, 2]
    assert caplog.messages[1] == "s3://b/a.tar failed (connection lost): attempt 3 in 1 s"
    with pytest.raises(DataError, match=r"'s3://b/a.tar' failed 4 times in a row \(last: connection lost\)"):
        retry.after(4, "s3://b/a.tar", error)


def test_remote_folders_are_listed(memory: fsspec.AbstractFileSystem, server: FlakyServer) -> None:
    assert list_remote("memory://shards/*.tar") == ["memory:///shards/a.tar", "memory:///shards/b.tar"]
    server.files["/x/"], server.script = b'<a href="b.tar">b</a><a href="a.tar">a</a><a href="a.json">j</a>', [503]
    waits: list[float] = []
    found = list_remote(f"{server.address}/x/*.tar", Retry(wait=waits.append))
    assert found == [f"{server.address}/x/a.tar", f"{server.address}/x/b.tar"] and waits == [1.0]
    with pytest.raises(DataError, match="missing shard"):
        list_remote(f"{server.address}/none/*.tar")
