"""From pictures to tars through the command line, and back through the reader; reruns, faults and workers."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

from megarq.data.faults import Faults
from megarq.data.files import expand_shards
from megarq.data.image_shards import ImageSample, read_samples
from megarq.errors import DataError


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_script("tools/make_shards.py")


@pytest.fixture
def photos(tmp_path: Path, png: Callable[[int], bytes]) -> Path:
    """Five pictures in two folders, one caption beside the first."""
    folder = tmp_path / "photos"
    for number, name in enumerate(("cat/a.png", "cat/b.v2.png", "dog/c.PNG", "dog/d.png", "dog/e.png")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    (folder / "cat" / "a.txt").write_text("a cat\n")
    return folder


@pytest.fixture
def make(tool: ModuleType, photos: Path, tmp_path: Path) -> Callable[..., dict[str, ImageSample]]:
    """Run the tool and read its shards: samples by key."""

    def run(*options: str, images: Path = photos, output: str = "shards") -> dict[str, ImageSample]:
        source = [] if "--shards" in options else ["--images", str(images)]
        tool.main([*source, "--output", str(tmp_path / output), "--workers", "0", *options])
        faults = Faults()
        return {s.key: s for shard in expand_shards(str(tmp_path / output)) for s in read_samples(shard, faults)}

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_comes_back_with_its_bytes_captions_and_classes(make: Callable, photos: Path) -> None:
    samples = make("--class-folders")
    assert set(samples) == {"cat_a", "cat_b_v2", "dog_c", "dog_d", "dog_e"}
    assert samples["cat_a"].captions == ["a cat"] and samples["dog_d"].captions == []
    assert [samples[key].label for key in ("cat_b_v2", "dog_e")] == [0, 1]
    assert samples["dog_c"].image == (photos / "dog" / "c.PNG").read_bytes()


def test_several_captions_come_back_in_order(make: Callable, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text('image,caption\ncat/a.png,"a cat, sitting"\ndog/c.PNG,dog\ncat/a.png,Katze ü\n')
    samples = make("--captions", str(tmp_path / "c.csv"))
    assert samples["cat_a"].captions == ["a cat, sitting", "Katze ü"] and samples["dog_c"].captions == ["dog"]


def test_shards_have_the_size_and_name_asked_for(make: Callable, tmp_path: Path) -> None:
    make("--samples-per-shard", "2", "--prefix", "train-")
    shards = sorted((tmp_path / "shards").glob("*.tar"))
    assert [shard.name for shard in shards] == [f"train-0000{number}.tar" for number in range(3)]
    assert [len(list(read_samples(str(shard), Faults()))) for shard in shards] == [2, 2, 1]


def test_images_are_shuffled_unless_told_otherwise(make: Callable) -> None:
    shuffled, kept = list(make()), list(make("--no-shuffle", output="kept"))
    assert shuffled != kept == sorted(kept)


def test_the_bytes_do_not_depend_on_workers_nor_on_folder_or_zip(make: Callable, photos: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in photos.rglob("*.*"):
            archive.write(path, path.relative_to(tmp_path))
    make("--samples-per-shard", "2")
    make("--samples-per-shard", "2", "--workers", "2", images=tmp_path / "photos.zip", output="zip")
    assert contents(tmp_path / "zip") == contents(tmp_path / "shards")


def test_tars_are_packed_anew_and_back(make: Callable, tmp_path: Path) -> None:
    samples = make("--class-folders", "--samples-per-shard", "2")
    again = make("--shards", str(tmp_path / "shards"), "--seed", "1", "--workers", "2", output="again")
    assert [sample.__dict__ | {"shard": ""} for sample in samples.values()] != [
        sample.__dict__ | {"shard": ""} for sample in again.values()
    ]
    for key, sample in samples.items():
        assert again[key].__dict__ | {"shard": ""} == sample.__dict__ | {"shard": ""}
    assert len(contents(tmp_path / "again")) == 2


def test_a_rerun_makes_only_what_is_missing(make: Callable, tmp_path: Path) -> None:
    make("--samples-per-shard", "2")
    before, folder = contents(tmp_path / "shards"), tmp_path / "shards"
    kept = (folder / "00000.tar").stat().st_ino
    (folder / "00001.tar").unlink()
    (folder / ".00001.tar.pending").write_bytes(b"half")
    make("--samples-per-shard", "2")
    assert contents(folder) == before and (folder / "00000.tar").stat().st_ino == kept


@pytest.mark.parametrize("options", [["--samples-per-shard", "5"], ["--seed", "1"], ["--class-folders"]])
def test_shards_of_another_list_are_not_mixed_in(make: Callable, tmp_path: Path, options: list[str]) -> None:
    make("--samples-per-shard", "2")
    before = contents(tmp_path / "shards")
    with pytest.raises(DataError, match=r"already holds 00000\.tar of another list"):
        make("--samples-per-shard", "2", *options)
    assert contents(tmp_path / "shards") == before


def test_a_shard_that_lacks_a_picture_takes_its_name_only_once_that_is_accepted(
    make: Callable, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = {"shards.json", "00000.tar", "00001.tar"}
    (photos / "dog" / "d.png").unlink()
    (photos / "dog" / "d.png").symlink_to("gone")
    with pytest.raises(DataError, match="1 bad samples of 5 seen"):
        make("--samples-per-shard", "3")
    names = {path.name for path in (tmp_path / "shards").iterdir()}
    assert len(names & whole) == 2, "one of the two shards is whole"
    assert "skipped dog_d in 0000" in caplog.text and "missing file" in caplog.text
    assert len(make("--samples-per-shard", "3", "--max-bad-rate", "0.2")) == 4
    assert {path.name for path in (tmp_path / "shards").iterdir()} == whole


def test_a_damaged_file_of_a_zip_is_a_fault(make: Callable, photos: Path, tmp_path: Path) -> None:
    picture = (photos / "dog" / "d.png").read_bytes()
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(photos / "cat" / "a.png", "a.png")
        archive.writestr("d.png", picture)
    damaged = (tmp_path / "photos.zip").read_bytes().replace(picture, picture[:-1] + b"?")
    (tmp_path / "photos.zip").write_bytes(damaged)
    with pytest.raises(DataError, match="1 unreadable image.*d in 00000.tar.*Bad CRC"):
        make(images=tmp_path / "photos.zip")


def test_faults_are_told_at_the_end(make: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.csv").write_text("image,caption\ncat/a.png,a\ncat/gone.png,b\n")
    make("--captions", str(tmp_path / "c.csv"), "--max-bad-rate", "0.5")
    printed = capsys.readouterr().out
    assert "1 x missing file" in printed and "pictures that no row names, left out" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples-per-shard", "0"], "--samples-per-shard 0"),
        (["--shards", "x.tar", "--class-folders"], "go with --images, not with --shards"),
    ],
)
def test_wrong_options_are_refused(make: Callable, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(*options)


def test_a_damaged_record_is_named(make: Callable, tmp_path: Path) -> None:
    make()
    (tmp_path / "shards" / "shards.json").write_text("{")
    with pytest.raises(DataError, match=r"shards\.json is no JSON"):
        make()
