"""Shard patterns and whole-or-nothing writing."""

import logging
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from captioned_tars import picture, write_tar

from megarq.data.files import data_file, expand_shards, local_part
from megarq.data.image_sources import open_images
from megarq.data.pictures import open_pictures
from megarq.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (2, 0, 1):
        (tmp_path / f"{number:05d}.tar").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        ("data/cc3m/{00000..00331}.tar", "data/cc3m"),
        ("data/*/00000.tar", "data"),
        ("imagenet/train", "imagenet/train"),
        ("*.tar", "."),
        ("pipe:cat a.tar", None),
        ("https://host/{0..9}.tar", None),
    ],
)
def test_the_part_of_a_pattern_that_must_be_there_ends_before_its_first_wildcard(pattern, part) -> None:
    assert local_part(pattern) == (None if part is None else Path(part))


def test_globs_are_sorted(folder: Path) -> None:
    assert [Path(shard).name for shard in expand_shards(f"{folder}/*.tar")] == ["00000.tar", "00001.tar", "00002.tar"]


def test_braces_keep_their_order_and_width(folder: Path) -> None:
    assert [Path(shard).name for shard in expand_shards(f"{folder}/{{00001..00000}}.tar")] == ["00001.tar", "00000.tar"]


def test_a_folder_means_its_tars(folder: Path) -> None:
    assert len(expand_shards(str(folder))) == 3


def test_patterns_add_up(folder: Path) -> None:
    assert len(expand_shards([f"{folder}/00002.tar", f"{folder}/{{00000..00001}}.tar"])) == 3


def test_a_shard_named_twice_is_read_once_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        shards = expand_shards([f"{folder}/*.tar", f"{folder}/00001.tar"])
    assert len(shards) == 3 and "00001.tar is named 2 times" in caplog.text


def test_a_missing_shard_of_a_range_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"missing shard .*00003\.tar"):
        expand_shards(f"{folder}/{{00000..00003}}.tar")


def test_what_img2dataset_puts_beside_the_tars_is_no_shard(folder: Path) -> None:
    for name in ("00000.parquet", "00000_stats.json"):
        (folder / name).touch()
    assert len(expand_shards(f"{folder}/*")) == 3


def test_addresses_and_commands_are_expanded() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/set/{name}": b"" for name in ("1.tar", "0.tar", "0.parquet")})
    listed = ["memory:///set/0.tar", "memory:///set/1.tar"]
    assert expand_shards("memory://set/") == expand_shards("memory://set/*") == listed
    assert expand_shards("s3://b/{00..01}.tar") == ["s3://b/00.tar", "s3://b/01.tar"]
    assert expand_shards("https://h/a.tar?list=*,b") == ["https://h/a.tar?list=*,b"]
    command = "pipe:aws s3 cp s3://b/{0..1}.tar - | awk -F, '{print}' *"
    assert expand_shards(command) == [command.replace("{0..1}", number) for number in "01"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("nowhere/*.tar", "no .tar file matches 'nowhere/\\*.tar'"),
        ("memory://none/*.tar", "missing shard 'memory://none/\\*.tar'"),
        ([], "no shards given"),
        ("a{0..3.tar", "unbalanced braces"),
    ],
)
def test_patterns_without_shards_are_refused(patterns: str | list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        expand_shards(patterns)


def test_an_unwritable_folder_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"), data_file(tmp_path / "no" / "a.tar"):
        pass


def test_an_interrupted_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), data_file(tmp_path / "a.tar") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "said"), [("nope", "no such file or folder"), ("notes.txt", "a file, but no tar")])
@pytest.mark.parametrize("open_it", [open_pictures, lambda source: open_images([source])], ids=["scored", "trained on"])
def test_what_holds_no_pictures_is_told_what_may(
    tmp_path: Path, name: str, said: str, open_it: Callable[[str], object]
) -> None:
    (tmp_path / "notes.txt").write_text("no pictures")
    told = (
        rf"{name}: {said}\. Give a folder of pictures, image shards such as 'shards/\*\.tar', an LMDB or a set of drawn"
    )
    with pytest.raises(DataError, match=told):
        open_it(str(tmp_path / name))


def test_a_tar_of_any_name_holds_pictures(tmp_path: Path) -> None:
    write_tar(tmp_path / "shard.bin", {"a.png": picture(0)})
    assert len(open_images([str(tmp_path / "shard.bin")])) == len(open_pictures(tmp_path / "shard.bin")) == 1
