"""Which captions and classes a set is drawn for: chosen by seed, as listed, as published, balanced."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from megarq.data.picture_items import caption_items, class_items, coco_items, listed_items, prompt_items
from megarq.data.picture_set import Item
from megarq.errors import DataError


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    """Ten images with five captions each, image 3 with one more, and a blank one."""
    notes = [(image, f"caption {turn} of {image}") for turn in range(5) for image in range(9, -1, -1)]
    notes += [(3, "caption 5 of 3"), (3, "  ")]
    content = {
        "images": [{"id": image, "file_name": f"COCO_val2014_{image:012d}.jpg"} for image in range(10)],
        "annotations": [{"image_id": image, "caption": text} for image, text in notes],
    }
    return write(tmp_path / "captions_val2014.json", content)


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_captions_are_of_different_images_as_far_as_they_go(annotations: Path) -> None:
    drawn = coco_items(annotations, 51, seed=0)
    for turn in range(5):
        assert {item.id for item in drawn[10 * turn : 10 * turn + 10]} == set(range(10))
    assert len({item.prompt for item in drawn}) == 51
    assert all(str(item.prompt).endswith(f" of {item.id}") for item in drawn)


def test_fewer_captions_are_the_first_of_more(annotations: Path) -> None:
    assert coco_items(annotations, 7, seed=4) == coco_items(annotations, 30, seed=4)[:7]


def test_the_seed_chooses_images_and_captions(annotations: Path) -> None:
    one, other = coco_items(annotations, 10, seed=0), coco_items(annotations, 10, seed=1)
    assert [item.id for item in one] != [item.id for item in other]
    assert {item.prompt for item in one} != {item.prompt for item in other}
    assert len({str(item.prompt).split()[1] for item in one}) > 1  # not always an image's first caption


def test_the_choice_does_not_depend_on_the_order_of_the_images(annotations: Path, tmp_path: Path) -> None:
    content = json.loads(annotations.read_bytes())
    content["annotations"].sort(key=lambda note: note["image_id"])
    sorted_file = write(tmp_path / "sorted.json", content)
    assert coco_items(sorted_file, 30, seed=0) == coco_items(annotations, 30, seed=0)


def test_fewer_captions_than_asked_for_are_an_error(annotations: Path) -> None:
    with pytest.raises(DataError, match=r"has 51 captions of 10 images, fewer than --count 30000\. Use --count 51"):
        coco_items(annotations, 30_000, seed=0)


@pytest.mark.parametrize(
    "content",
    ['{"images": []}', '{"annotations": [{"image_id": 1}]}', '{"annotations": 3}', "[]", '{"annotations": [["a"]]}'],
)
def test_a_file_of_another_kind_is_no_coco(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match="is no COCO caption file .* Give one like captions_val2014.json"):
        coco_items(write(tmp_path / "a.json", content), 1, seed=0)


def test_the_authors_list_is_read_as_they_read_it(annotations: Path) -> None:
    """torchvision's CocoCaptions goes by image id, and they take the first of each image's captions."""
    assert listed_items(annotations) == [Item(f"caption 0 of {image}", id=image) for image in range(10)]


@pytest.mark.parametrize(
    ("name", "content", "items"),
    [
        ("a.json", ["a fox", "two"], [Item("a fox"), Item("two")]),
        ("a.json", [{"image_id": 5, "caption": " a fox\n"}], [Item("a fox", id=5)]),
        ("a.json", [{"prompt": "a fox", "id": "x"}], [Item("a fox", id="x")]),
        ("a.csv", "uid,caption\n9_mscoco_2,A woman, \n", None),
        ("a.csv", 'uid,caption\n9_mscoco_2,"A bus, red"\n', [Item("A bus, red", id="9_mscoco_2")]),
    ],
)
def test_lists_of_several_kinds_are_read(tmp_path: Path, name: str, content: Any, items: list[Item] | None) -> None:
    path = write(tmp_path / name, content)
    if items is not None:
        assert listed_items(path) == items
    else:
        assert listed_items(path) == [Item("A woman", id="9_mscoco_2")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is empty"),
        (["a", 3], "entry 2 is 3, no caption"),
        ([{"image_id": 4}], "entry 1 is {'image_id': 4}, no caption"),
        (["a", " "], "entry 2 is ' ', no caption"),
        ([{"caption": "a", "id": [1]}], "no caption"),
        ("3", "holds a int"),
        ("{", "cannot be read as JSON"),
        (["\ud800"], "is no text"),
        (["a"], "has 1 captions, fewer than --count 2"),
    ],
)
def test_what_is_no_list_of_captions_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        listed_items(write(tmp_path / "list.json", content), 2)


@pytest.mark.parametrize(
    "text",
    [
        "a fox\thttp://a/1\ntwo foxes\thttps://b/2\n",
        "caption\turl\r\na fox\thttp://a/1\r\ntwo foxes\thttp://b/2",
        "http://a/1\ta fox\nhttp://b/2\ttwo foxes\n",
        "val/1.jpg\ta fox\nval/2.jpg\ttwo foxes\n",
    ],
    ids=["published", "with a head", "cc12m", "the authors' list"],
)
def test_lines_of_caption_and_address_are_numbered(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "val.tsv", text)
    assert caption_items([str(path)]) == [Item("a fox", id=0), Item("two foxes", id=1)]
    assert caption_items([str(path)], 1) == [Item("a fox", id=0)]


@pytest.mark.parametrize("line", ["a fox", "a fox\tb\tc", "http://a\thttp://b", " \thttp://a", "", "a\tb"])
def test_a_line_of_another_kind_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "val.tsv", f"a fox\thttp://a/1\n{line}\n")
    with pytest.raises(DataError, match=r"row 1 is .*Give a list like CC-3M's"):
        caption_items([str(path)])


def test_the_captions_of_image_shards_keep_their_keys(image_tars: list[str]) -> None:
    items = caption_items(image_tars)
    assert len(items) == 23 and items[22] == Item("picture 22", id="s022")


def test_a_picture_without_caption_is_named(make_tar: Callable[[str, Mapping[str, bytes]], str]) -> None:
    with pytest.raises(DataError, match=r"b in .*a\.tar has no caption"):
        caption_items([make_tar("a.tar", {"a.jpg": b"I", "a.txt": b"a fox", "b.jpg": b"I"})])


def test_classes_are_balanced_and_in_order() -> None:
    labels = [item.label for item in class_items(11, 4)]
    assert labels == sorted(labels, key=lambda label: label or 0)
    assert Counter(labels) == {0: 3, 1: 3, 2: 3, 3: 2}
    assert set(Counter(item.label for item in class_items(50_000, 1000)).values()) == {50}
    assert [item.label for item in class_items(2, 4)] == [0, 1]


def test_a_text_file_has_a_caption_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "prompts.txt", '\ufeffa red bus\r\n\n  ein Fu\u00df \n\t\nred, "blue"')
    assert prompt_items(path) == [Item("a red bus", id=1), Item("ein Fu\u00df", id=3), Item('red, "blue"', id=5)]
    assert "2 blank lines are left out" in caplog.text


def test_a_last_line_that_ends_is_no_blank_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert prompt_items(write(tmp_path / "prompts.txt", "two\n")) == [Item("two", id=1)]
    assert not caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read \(.*No such file.*Give UTF-8 text, and check the path"),
        (b"", "holds no caption, but 0 blank lines. Give a caption a line"),
        (b"\n \n", "holds no caption, but 2 blank lines"),
        (b"two\nthree\rfour\r", "line 2 holds carriage returns. End lines with a line feed"),
        (b"two\n" + b"a" * 1001, "line 2 has 1001 characters: give at most 1000"),
        (b"two\n\xff\xfe", "cannot be read .*utf-8.*Give UTF-8 text"),
    ],
)
def test_a_text_file_without_captions_is_an_error(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        prompt_items(path)


@pytest.mark.parametrize(
    ("read", "name", "message"),
    [
        (listed_items, "none.json", r"none.json cannot be read \(No such file or directory\)\. Check the path"),
        (listed_items, "a.json", r"a.json cannot be read as JSON .* a \.csv of captions is given to --items"),
        (lambda path: caption_items([str(path)]), "none.tsv", "none.tsv cannot be read .*No such file"),
        (
            lambda path: caption_items([str(path)]),
            "a.csv",
            r"a.csv is no list like CC-3M's\. Give it to .*coco.py --items",
        ),
    ],
)
def test_another_file_than_is_wanted_is_told(
    tmp_path: Path, read: Callable[[Path], object], name: str, message: str
) -> None:
    for there in ("a.json", "a.csv"):
        (tmp_path / there).write_text("caption,uid\na seven,1\n")
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)
