"""From folders and tables to tars, through the command line, and back through the reader."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from megarq.data.files import expand_shards
from megarq.data.image_shards import BadSamples, ImageSample, read_samples
from megarq.errors import DataError

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_shards", ROOT / "tools" / "make_shards.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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

    def run(*options: str, output: str = "shards") -> dict[str, ImageSample]:
        tool.main(["--images", str(photos), "--output", str(tmp_path / output), *options])
        shards = expand_shards(str(tmp_path / output))
        return {sample.key: sample for shard in shards for sample in read_samples(shard, BadSamples())}

    return run


def table(tmp_path: Path, text: str, name: str = "captions.csv") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_a_folder_comes_back_with_the_captions_beside_it(make: Callable, photos: Path) -> None:
    samples = make()
    assert set(samples) == {"cat_a", "cat_b_v2", "dog_c", "dog_d", "dog_e"}
    assert samples["cat_a"].captions == ["a cat"] and samples["dog_d"].captions == []
    assert samples["dog_c"].image == (photos / "dog" / "c.PNG").read_bytes()


def test_rows_of_one_image_are_its_captions(make: Callable, tmp_path: Path) -> None:
    rows = 'image,caption,label\ncat/a.png,"a cat, sitting",0\ndog/c.PNG,dog,1\ncat/a.png,Katze ü,0\n'
    samples = make("--captions", table(tmp_path, rows))
    assert samples["cat_a"].captions == ["a cat, sitting", "Katze ü"] and samples["cat_a"].label == 0
    assert samples["dog_c"].captions == ["dog"] and set(samples) == {"cat_a", "dog_c"}


def test_tsv_is_split_at_tabs(make: Callable, tmp_path: Path) -> None:
    samples = make("--captions", table(tmp_path, "caption\timage\na cat, sitting\tcat/a.png\n", "c.tsv"))
    assert samples["cat_a"].captions == ["a cat, sitting"] and samples["cat_a"].label is None


def test_class_folders_are_numbered_in_order(make: Callable) -> None:
    labels = {key: sample.label for key, sample in make("--class-folders").items()}
    assert labels == {"cat_a": 0, "cat_b_v2": 0, "dog_c": 1, "dog_d": 1, "dog_e": 1}


def test_shards_have_the_size_and_name_asked_for(make: Callable, tmp_path: Path) -> None:
    make("--samples-per-shard", "2", "--prefix", "train-")
    shards = sorted((tmp_path / "shards").iterdir())
    assert [shard.name for shard in shards] == [f"train-0000{number}.tar" for number in range(3)]
    assert [len(list(read_samples(str(shard), BadSamples()))) for shard in shards] == [2, 2, 1]


def test_images_are_shuffled_unless_told_otherwise(make: Callable) -> None:
    shuffled, kept = list(make()), list(make("--no-shuffle", output="kept"))
    assert shuffled != kept == sorted(kept)


def test_a_rerun_writes_the_same_bytes(make: Callable, tmp_path: Path) -> None:
    make("--samples-per-shard", "3")
    before = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    make("--samples-per-shard", "3")
    assert {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()} == before


def test_missing_images_are_named_and_stop_above_the_rate(
    make: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    captions = table(tmp_path, "image,caption\ncat/a.png,a\ncat/gone.png,b\n")
    with pytest.raises(DataError, match="1 bad samples of 2 seen"):
        make("--captions", captions)
    assert "line 3" in caplog.text and "gone.png" in caplog.text
    assert set(make("--captions", captions, "--max-bad-rate", "0.5")) == {"cat_a"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,text\na,b\n", "no column 'image'; its first line names file, text"),
        ("", "first line names nothing"),
        ('image,caption\n"cat/a.png,x\n', "cannot be read as a UTF-8 table"),
        ("image,caption\nnone.png,x\n", "names no image that exists"),
        ("image,caption,label\ncat/a.png,x,cat\n", "line 2: label 'cat' is no class number"),
    ],
)
def test_bad_tables_are_refused(make: Callable, tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make("--captions", table(tmp_path, content))


def test_a_table_that_is_not_text_is_refused(make: Callable, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as a UTF-8 table"):
        make("--captions", str(tmp_path / "c.csv"))


def test_a_missing_table_is_refused(make: Callable, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Check --captions"):
        make("--captions", str(tmp_path / "none.csv"))


def test_a_caption_file_that_is_not_text_is_refused(make: Callable, photos: Path) -> None:
    (photos / "cat" / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8"):
        make()


def test_two_images_of_one_key_are_refused(make: Callable, photos: Path, png: Callable[[int], bytes]) -> None:
    (photos / "cat" / "a.jpg").write_bytes(png(9))
    with pytest.raises(DataError, match="have the same key 'cat_a'"):
        make()


def test_an_image_outside_the_class_folders_is_refused(make: Callable, photos: Path) -> None:
    (photos / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match="lies in no class folder"):
        make("--class-folders")


def test_shards_of_another_list_are_not_mixed_in(make: Callable) -> None:
    make("--samples-per-shard", "2")
    with pytest.raises(DataError, match=r"already holds 00001\.tar"):
        make("--samples-per-shard", "5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples-per-shard", "0"], "--samples-per-shard 0"),
        (["--captions", "x.csv", "--class-folders"], "--captions with --class-folders"),
    ],
)
def test_wrong_options_are_refused(make: Callable, options: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(*options)


def test_a_folder_without_images_is_refused(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images below"):
        tool.main(["--images", str(tmp_path), "--output", str(tmp_path / "out")])


def test_a_missing_image_folder_is_refused(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        tool.main(["--images", str(tmp_path / "none"), "--output", str(tmp_path / "out")])
