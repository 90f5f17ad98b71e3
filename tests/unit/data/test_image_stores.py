"""Listing and reading the files of folders and zips."""

import zipfile
from pathlib import Path

import pytest

from megarq.data.image_stores import open_store
from megarq.errors import DataError


def make_zip(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name.encode())
    return path


def make_folder(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(name.encode())
    return path


@pytest.mark.parametrize("make", [make_folder, make_zip])
def test_hidden_files_are_left_out_and_the_others_read(make, tmp_path):
    names = ("b/x.jpg", "a/y.jpg", "z.txt", ".hidden.jpg", ".cache/t.jpg", "__MACOSX/b/._x.jpg")
    store = open_store(make(tmp_path / "store", *names))
    assert store.files == ["a/y.jpg", "b/x.jpg", "z.txt"]
    assert store.folders == ["a", "b"]
    assert store.read("b/x.jpg") == b"b/x.jpg"


def test_the_only_folder_of_a_zip_is_its_root(tmp_path):
    store = open_store(make_zip(tmp_path / "z.zip", "train2014/", "train2014/1.jpg", "train2014/b/2.jpg", "__MACOSX/x"))
    assert store.files == ["1.jpg", "b/2.jpg"] and store.read("1.jpg") == b"train2014/1.jpg"


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    make_folder(tmp_path / "elsewhere", "x.jpg")
    store = make_folder(tmp_path / "store", "a/y.jpg")
    (store / "b").symlink_to(tmp_path / "elsewhere")
    (store / "a" / "up").symlink_to(store)
    (tmp_path / "elsewhere" / "self").symlink_to(".")
    assert open_store(store).files == ["a/y.jpg", "b/x.jpg"]
    assert open_store(store).folders == ["a", "b"]


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg"])
def test_a_zip_with_names_outside_is_refused(tmp_path, name):
    with pytest.raises(DataError, match="leads out of it"):
        open_store(make_zip(tmp_path / "z.zip", "a/x.jpg", name))


def test_a_damaged_zip_is_refused(tmp_path):
    path = make_zip(tmp_path / "z.zip", *(f"{number}.jpg" for number in range(9)))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02")] = 0
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as a zip file"):
        open_store(path)


def test_what_is_neither_folder_nor_zip_is_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(bytes(10240))
    for name in ("none", "x.tar"):
        with pytest.raises(DataError, match="is no folder and no zip file"):
            open_store(tmp_path / name)
