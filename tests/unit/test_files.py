"""Files that are whole or not there."""

import subprocess
from pathlib import Path

import pytest
from little_space import little_space

from megarq.files import atomic_file, make_room, write_atomically


def test_a_file_that_fails_half_way_leaves_the_earlier_one(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.json", "whole")
    with pytest.raises(KeyError), atomic_file(tmp_path / "a.json") as file:
        file.write(b"half")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "whole"


def test_the_error_of_a_full_disk_names_the_file(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = tmp_path / "full"
    request.addfinalizer(lambda: subprocess.run(["umount", str(folder)], capture_output=True))
    with little_space(folder, size=32 * 1024):
        with pytest.raises(OSError, match="a.bin") as caught:
            write_atomically(folder / "a.bin", bytes(64 * 1024))
        assert caught.value.filename == str(folder / "a.bin")
        assert not list(folder.iterdir())


def test_room_is_made_for_a_file_in_folders_to_come(tmp_path: Path) -> None:
    make_room(tmp_path / "new" / "deep" / "a.json")
    assert list((tmp_path / "new" / "deep").iterdir()) == []


def test_where_no_file_can_be_written_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("a file")
    (tmp_path / "b").mkdir()
    with pytest.raises(OSError, match="a") as caught:
        make_room(tmp_path / "a" / "x.json")
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(IsADirectoryError) as caught:
        make_room(tmp_path / "b")
    assert caught.value.filename == str(tmp_path / "b")
    monkeypatch.setattr("megarq.files.os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError) as caught:
        make_room(tmp_path / "b" / "x.json")
    assert caught.value.filename == str(tmp_path / "b")
