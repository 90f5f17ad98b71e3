"""The contract of generated pictures on disk: the same bytes always, whole or not at all, one set in a folder."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from captioned_tars import contents
from PIL import Image

from megarq.data.faults import Faults
from megarq.data.image_shards import ImageIndex
from megarq.data.picture_set import Item, PictureSet, PictureSettings, Sample, begin_set, items_digest
from megarq.errors import DataError

ITEMS = [Item("ein Fuß", id=7), Item(label=3), Item(), Item("two", id="two.jpg"), Item("three")]
SETTINGS = PictureSettings(
    count=5,
    pictures_per_tar=2,
    condition="text",
    seed=0,
    sampling={"top_k": None, "top_p": [0.9, 0.8], "temperature": 1.0, "guidance": 1.0},
    batch_size=2,
    dtype="fp32",
    threads=1,
    model={"fingerprint": "f" * 64, "name": "model", "weights": "ema", "step": 3},
    items=items_digest(ITEMS),
    keep_fraction=1.0,
    ranker=None,
    resolution=4,
)
PLACES = [range(0, 2), range(2, 4), range(4, 5)]


def picture(number: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)).convert(mode)


def samples(places: range) -> Iterator[Sample]:
    return (Sample(ITEMS[place], picture(place)) for place in places)


@pytest.fixture
def begun(tmp_path: Path) -> Callable[..., PictureSet]:
    """`begun(name, **changes)`: the set of ITEMS, with other settings, in a folder of its own."""
    return lambda name="set", **changes: PictureSet(tmp_path / name, replace(SETTINGS, **changes), PLACES)


def fill(pictures: PictureSet) -> None:
    for index in pictures.take(0, 1):
        pictures.write(index, samples(PLACES[index]))


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_a_tar_holds_pngs_with_what_they_were_asked_to_show(begun: Callable[..., PictureSet]) -> None:
    pictures = begun()
    fill(pictures)
    found = members(pictures.path(0)) | members(pictures.path(1))
    assert list(found) == [f"{place:08d}.{kind}" for place in range(4) for kind in ("png", "json")]
    assert [json.loads(found[f"{place:08d}.json"]) for place in range(4)] == [
        {"index": 0, "prompt": "ein Fuß", "id": 7},
        {"index": 1, "class": 3, "id": None},
        {"index": 2, "id": None},
        {"index": 3, "prompt": "two", "id": "two.jpg"},
    ]
    shown = Image.open(io.BytesIO(found["00000003.png"]))
    assert shown.mode == "RGB" and np.array_equal(np.asarray(shown), np.asarray(picture(3)))


def test_a_score_stands_beside_the_index_it_was_drawn_with(begun: Callable[..., PictureSet]) -> None:
    pictures = begun()
    pictures.write(2, [Sample(ITEMS[4], picture(0), 0.25, 2**32 + 4)])
    record = json.loads(members(pictures.path(2))["00000004.json"])
    assert record == {"index": 4, "prompt": "three", "id": None, "score": 0.25, "candidate": 2**32 + 4}


def test_grey_pictures_are_written_in_colour(begun: Callable[..., PictureSet]) -> None:
    pictures = begun()
    pictures.write(2, [Sample(ITEMS[4], picture(0, "L"))])
    assert Image.open(io.BytesIO(members(pictures.path(2))["00000004.png"])).mode == "RGB"


def test_the_bytes_depend_on_the_pictures_alone(begun: Callable[..., PictureSet], tmp_path: Path) -> None:
    for name in ("one", "other"):
        fill(begun(name))
        assert begun(name).finish()
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    with tarfile.open(tmp_path / "one" / "000000.tar") as tar:
        assert {(entry.mtime, entry.uid, entry.gid, entry.mode) for entry in tar} == {(0, 0, 0, 0o644)}


def test_a_set_is_complete_only_with_all_its_tars(begun: Callable[..., PictureSet], tmp_path: Path) -> None:
    pictures = begun()
    pictures.write(0, samples(PLACES[0]))
    assert not pictures.finish() and PictureSettings.load(tmp_path / "set") == (SETTINGS, False)
    fill(pictures)
    assert pictures.finish() and PictureSettings.load(tmp_path / "set") == (SETTINGS, True)
    assert sorted(contents(tmp_path / "set")) == ["000000.tar", "000001.tar", "000002.tar", "pictures.json"]


def test_other_programs_read_it_as_image_shards(begun: Callable[..., PictureSet]) -> None:
    pictures = begun()
    fill(pictures)
    index = ImageIndex([str(pictures.path(number)) for number in range(3)], Faults(0))
    assert [index.name(place)[1] for place in range(5)] == [f"{place:08d}" for place in range(5)]


def test_a_run_goes_on_where_another_stopped(begun: Callable[..., PictureSet]) -> None:
    begun().write(1, samples(PLACES[1]))
    assert list(begun().take(0, 1)) == [0, 2]


def test_a_tar_that_fails_leaves_nothing(begun: Callable[..., PictureSet], tmp_path: Path) -> None:
    def failing() -> Iterator[Sample]:
        yield Sample(ITEMS[0], picture(0))
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        begun().write(0, failing())
    assert sorted(path.name for path in (tmp_path / "set").glob("*.t*")) == []


def test_a_set_whose_tar_was_removed_is_no_longer_complete(begun: Callable[..., PictureSet], tmp_path: Path) -> None:
    fill(begun())
    begun().finish()
    begun().path(1).unlink()
    assert list(begun().take(0, 1)) == [1]
    assert not PictureSettings.load(tmp_path / "set")[1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed=0, this command has seed=1"),
        ({"sampling": SETTINGS.sampling | {"top_k": 5}}, "sampling.top_k=None, this command has sampling.top_k=5"),
        ({"sampling": SETTINGS.sampling | {"top_p": 1.0}}, r"sampling.top_p=\[0.9, 0.8\], .*sampling.top_p=1.0"),
        ({"sampling": SETTINGS.sampling | {"guidance": 2.0}}, "sampling.guidance=1.0, .*sampling.guidance=2.0"),
        ({"model": SETTINGS.model | {"fingerprint": "e"}}, "model.fingerprint=f+, this command has .*=e\\."),
        ({"threads": 2}, "threads=1, .*threads=2"),
        (
            {"ranker": {"network": "resnet101", "sha256": "a"}},
            "ranker.network=None, this command has ranker.network=resnet101",
        ),
        ({"items": items_digest(ITEMS[1:])}, "other prompts or classes than this command has"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused_by_name(
    begun: Callable[..., PictureSet], changes: dict[str, object], named: str
) -> None:
    begun()
    with pytest.raises(DataError, match=f"was begun with {named}.*Repeat the first command, or give another --output"):
        begun(**changes)


def test_a_command_that_is_refused_leaves_a_complete_set_as_it_is(
    begun: Callable[..., PictureSet], tmp_path: Path
) -> None:
    fill(begun())
    begun().finish()
    before = contents(tmp_path / "set")
    with pytest.raises(DataError, match="was begun with seed=0"):
        begun(seed=1)
    assert contents(tmp_path / "set") == before


def test_a_model_may_be_moved_and_renamed(begun: Callable[..., PictureSet]) -> None:
    begun()
    begun(model=SETTINGS.model | {"name": "elsewhere"})


def test_settings_are_the_same_after_json(begun: Callable[..., PictureSet]) -> None:
    begun(sampling=SETTINGS.sampling | {"top_p": (0.9, 0.8)})
    begun()


def test_a_set_of_before_there_were_guidance_and_tp_goes_on(begun: Callable[..., PictureSet], tmp_path: Path) -> None:
    begun()
    path = tmp_path / "set" / "pictures.json"
    content = json.loads(path.read_bytes())
    del content["sampling"]["guidance"], content["tp"]
    path.write_text(json.dumps(content))
    assert PictureSettings.load(tmp_path / "set") == (replace(SETTINGS, tp=None), False)
    fill(begun(tp=2))
    assert begun().finish()


def test_a_folder_of_other_tars_is_refused(begun: Callable[..., PictureSet], tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "00000.tar").touch()
    with pytest.raises(DataError, match=r"holds 00000.tar, but no pictures.json: give --output a folder of its own"):
        begun()


def test_an_output_that_is_a_file_is_refused(begun: Callable[..., PictureSet], tmp_path: Path) -> None:
    (tmp_path / "set").touch()
    with pytest.raises(DataError, match="cannot be made .*Give another folder"):
        begun()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no pictures.json"),
        ("{", "cannot be read"),
        (
            '{"format": "megarq-codes", "version": 2}',
            "format 'megarq-codes' version 2, but .* version 1",
        ),
        ("[]", "format None"),
        ('{"format": "megarq-pictures", "version": 1, "count": 3}', "lacks the field 'pictures_per_tar'"),
    ],
)
def test_a_damaged_description_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "pictures.json").write_text(content)
    with pytest.raises(DataError, match=message):
        PictureSettings.load(tmp_path)


@pytest.fixture
def loose(tmp_path: Path) -> Callable[..., PictureSet]:
    """`loose(name, **changes)`: the set of ITEMS without tars, in batches of two."""
    settings = replace(SETTINGS, pictures_per_tar=None)
    return lambda name="loose", **changes: begin_set(tmp_path / name, replace(settings, **changes), PLACES)


def test_without_tars_each_picture_has_a_json_that_tells_all_about_it(
    loose: Callable[..., PictureSet], tmp_path: Path
) -> None:
    fill(loose())
    assert loose().finish()
    names = [f"{place:06d}.{kind}" for place in range(5) for kind in ("json", "png")]
    assert sorted(contents(tmp_path / "loose")) == [*names, "pictures.json"]
    settings = {name: getattr(SETTINGS, name) for name in ("seed", "sampling", "dtype", "model")}
    record = json.loads((tmp_path / "loose" / "000003.json").read_bytes())
    assert record == {"index": 3, "prompt": "two", "id": "two.jpg", **settings}
    shown = Image.open(tmp_path / "loose" / "000003.png")
    assert shown.mode == "RGB" and np.array_equal(np.asarray(shown), np.asarray(picture(3)))


@pytest.mark.parametrize("lost", ["000002.png", "000003.json"])
def test_without_tars_a_batch_that_lacks_a_file_is_made_again(
    loose: Callable[..., PictureSet], tmp_path: Path, lost: str
) -> None:
    fill(loose())
    assert loose().finish()
    before = contents(tmp_path / "loose")
    (tmp_path / "loose" / lost).unlink()
    assert not loose().finish() and list(loose().take(0, 1)) == [1]
    fill(loose())
    assert loose().finish() and contents(tmp_path / "loose") == before


def test_without_tars_a_batch_that_fails_leaves_whole_pictures(
    loose: Callable[..., PictureSet], tmp_path: Path
) -> None:
    def failing() -> Iterator[Sample]:
        yield Sample(ITEMS[0], picture(0))
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        loose().write(0, failing())
    assert not [path for path in (tmp_path / "loose").iterdir() if path.suffix == ".tmp"]
    assert loose().done() == []


def test_without_tars_other_pictures_and_other_formats_are_refused(
    loose: Callable[..., PictureSet], begun: Callable[..., PictureSet], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.png").touch()
    with pytest.raises(DataError, match=r"holds holiday.png, but no pictures.json: give --output a folder of its own"):
        loose("mine")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "000000.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds 000000.json, but no pictures.json: give --output a folder of its own"):
        loose("theirs")
    assert (tmp_path / "theirs" / "000000.json").read_text() == "{}"
    begun("tars")
    with pytest.raises(DataError, match="was begun with tp=1, this command has tp=2"):
        begun("tars", tp=2)
    with pytest.raises(DataError, match="was begun with pictures_per_tar=2, this command has pictures_per_tar=None"):
        loose("tars")


def test_the_digest_of_items_tells_all_of_them_apart() -> None:
    assert len({items_digest([item]) for item in ITEMS}) == len(ITEMS)
    assert items_digest(ITEMS) != items_digest(ITEMS[::-1])
