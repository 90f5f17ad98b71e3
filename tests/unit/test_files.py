"""Files that are whole or not there."""

import subprocess
from pathlib import Path

import pytest
from little_space import little_space

from megarq.files import atomic_file, write_atomically


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
