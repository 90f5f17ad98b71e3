"""Which pictures a folder, a table, MS-COCO's JSON and a list of addresses name, and what is a fault in them."""

import json
from pathlib import Path

import pytest

from megarq.data.faults import Faults
from megarq.data.image_lists import ImageList, list_captioned, list_folder
from megarq.data.image_stores import open_store
from megarq.errors import DataError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Files named as pictures are; lists do not read them."""
    for name in ("cat/a.jpg", "cat/b.jpg", "dog/c.png", "00/7.jpg", "00/0008.webp", "9.PNG"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"")
    return tmp_path / "photos"


@pytest.fixture
def listed(photos: Path, tmp_path: Path):
    """`listed(name, content)` lists the pictures that a file of this content names: {name: captions}."""

    def run(name: str, content: str | bytes, faults: Faults | None = None, **options: int) -> dict[str, list[str]]:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        images = list_captioned(open_store(photos), path, faults or Faults(), **options)
        return {image.name: image.captions for image in images.images}

    return run


def lenient() -> Faults:
    return Faults(0.9)


def coco(*said: tuple[int, object], **more: object) -> str:
    files = {1: "cat/a.jpg", 2: "cat/b.jpg", 3: "../outside.jpg"}
    images = [{"id": number, "file_name": name} for number, name in files.items()]
    return json.dumps({"images": images, "annotations": [{"image_id": i, "caption": text} for i, text in said]} | more)


def test_rows_of_a_table_are_captions_and_classes(listed, photos, tmp_path):
    table = (
        'image,caption,label\ncat/a.jpg,"a cat, sitting",0\n./dog//c.png,dog,1\ncat/a.jpg, Katze ü ,0\ncat/b.jpg,,0\n'
    )
    wanted = {"cat/a.jpg": ["a cat, sitting", "Katze ü"], "dog/c.png": ["dog"], "cat/b.jpg": []}
    assert listed("c.csv", table) == wanted
    images = list_captioned(open_store(photos), tmp_path / "c.csv", Faults()).images
    assert [image.label for image in images] == [0, 1, 0]


def test_a_tsv_with_our_header_is_split_at_tabs(listed):
    assert listed("c.tsv", "caption\timage\na cat, sitting\tcat/a.jpg\n") == {"cat/a.jpg": ["a cat, sitting"]}


def test_all_captions_of_coco_are_kept(listed):
    content = coco((1, "one.\n"), (2, "zwei"), (1, " two"), (1, "  "))
    assert listed("captions_train2014.json", content) == {"cat/a.jpg": ["one.", "two"], "cat/b.jpg": ["zwei"]}


def test_what_no_sample_is_made_of_is_counted(photos, tmp_path):
    (tmp_path / "c.json").write_text(coco((1, "one")))
    unused = list_captioned(open_store(photos), tmp_path / "c.json", Faults()).unused
    assert unused == {"images of the JSON without annotation": 2, "pictures that no row names": 5}
    for name in ("cat/a.txt", "cat/alone.txt"):
        (photos / name).write_text("x")
    assert folder(photos).unused == {".txt files without a picture": 1}


def addresses(count: int, row: str = "{caption}\t{url}", header: bool = False) -> str:
    lines = [row.format(caption=f'caption "{number}, with', url=f"http://x/{number}") for number in range(count)]
    return "\n".join([row.format(caption="caption", url="url")] * header + lines) + "\n"


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("row", ["{caption}\t{url}", "{url}\t{caption}"], ids=["cc3m", "cc12m"])
def test_row_n_of_an_address_list_is_picture_n(listed, header, row):
    faults = lenient()
    named = listed("cc.tsv", addresses(10, row, header), faults)
    assert named == {
        "00/7.jpg": ['caption "7, with'],
        "00/0008.webp": ['caption "8, with'],
        "9.PNG": ['caption "9, with'],
    }
    assert faults.counts == {"missing file": 7} and faults.seen == 10


def test_pictures_may_be_numbered_from_one(listed):
    assert listed("cc.tsv", addresses(9), lenient(), first_number=1)["9.PNG"] == ['caption "8, with']


def test_a_picture_beyond_the_rows_of_a_list_tells_of_a_wrong_first_number(listed):
    with pytest.raises(DataError, match="9.PNG is picture 9, but .* the rows 0 to 8. Use --first-number 1"):
        listed("cc.tsv", addresses(9), lenient())


def test_two_pictures_of_one_number_are_refused(listed, photos):
    (photos / "007.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"00/7.jpg and 007.png are both picture 7"):
        listed("cc.tsv", addresses(10), lenient())


@pytest.mark.parametrize("name", ["../photos/cat/a.jpg", "gone.jpg", "cat", "cat/a.txt", ""])
def test_a_row_without_a_picture_in_the_folder_is_a_missing_file(listed, caplog, name):
    faults = lenient()
    assert set(listed("c.csv", f"image,caption\n{name},x\ncat/b.jpg,y\n", faults)) == {"cat/b.jpg"}
    assert faults.counts == {"missing file": 1} and "line 2" in caplog.text


def test_an_absolute_name_is_a_missing_file(listed, photos):
    faults = lenient()
    assert set(listed("c.csv", f"image,caption\n{photos}/cat/a.jpg,x\ncat/b.jpg,y\n", faults)) == {"cat/b.jpg"}
    assert faults.counts == {"missing file": 1}


def test_coco_captions_of_pictures_that_are_missing_are_faults(listed):
    faults = lenient()
    assert set(listed("c.json", coco((3, "outside"), (4, "unknown"), (1, "one")), faults)) == {"cat/a.jpg"}
    assert faults.counts == {"missing file": 2} and faults.seen == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.csv", b"image,caption\ncat/a.jpg,\xff\xfe\ncat/b.jpg,good\n"),
        ("c.csv", b"image,caption\ncat/a.jpg,not quoted, with comma\ncat/b.jpg,good\n"),
        ("c.json", coco((1, "?"), (2, "good")).encode().replace(b"?", b"\xff")),
        ("c.json", coco((1, "?"), (2, "good")).encode().replace(b"?", b"\\ud800")),
    ],
    ids=["bytes in a table", "fields", "bytes in JSON", "half a surrogate pair"],
)
def test_a_caption_that_cannot_be_read_costs_its_row(listed, name, content):
    faults = lenient()
    assert listed(name, content, faults) == {"cat/b.jpg": ["good"]}
    assert faults.counts == {"unreadable text": 1} and faults.seen == 2


def test_a_row_of_an_address_list_with_too_many_fields_keeps_its_number(listed):
    faults = lenient()
    content = addresses(10).replace("http://x/3", "http://x/3\tmore")
    assert listed("cc.tsv", content, faults)["9.PNG"] == ['caption "9, with']
    assert faults.counts["unreadable text"] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", "file,text\na,b\n", "no column 'image'; its first line is 'file,text'"),
        ("c.csv", "", "no column 'image'"),
        ("c.csv", b"\xff\xfe\x00", "no column 'image'|cannot be read"),
        ("c.tsv", "a picture\tanother\n", "no column 'image'.*a .tsv of caption and url"),
        ("c.csv", 'image,caption\n"cat/a.jpg,x\n', "cannot be read"),
        ("c.csv", "image,caption,label\ncat/a.jpg,x,cat\n", "line 2: label 'cat' is no class number"),
        ("c.json", "[1", "is no COCO caption file"),
        ("c.json", coco(annotations=[{"image_id": 1, "bbox": []}]), "no COCO caption file .KeyError: 'caption'"),
        ("c.csv", "image,caption\n", "names no image that exists"),
    ],
)
def test_files_of_another_kind_are_refused(listed, name, content, message):
    with pytest.raises(DataError, match=message):
        listed(name, content)


def test_a_missing_table_is_refused(photos, tmp_path):
    with pytest.raises(DataError, match="Check --captions"):
        list_captioned(open_store(photos), tmp_path / "none.csv", Faults())


def folder(path: Path, faults: Faults | None = None, **options: bool) -> ImageList:
    return list_folder(open_store(path), faults or Faults(), **options)


def test_classes_are_numbered_by_folder_empty_ones_too(photos):
    (photos / "9.PNG").unlink()
    (photos / "bird").mkdir()
    labels = {image.name: image.label for image in folder(photos, class_folders=True).images}
    assert labels == {"00/7.jpg": 0, "00/0008.webp": 0, "cat/a.jpg": 2, "cat/b.jpg": 2, "dog/c.png": 3}


def test_an_image_outside_the_class_folders_is_refused(photos):
    with pytest.raises(DataError, match="9.PNG .* lies in no class folder"):
        folder(photos, class_folders=True)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="no images below"):
        folder(tmp_path)


def test_a_caption_file_that_is_not_text_costs_its_picture(photos):
    (photos / "cat" / "a.txt").write_bytes(b"\xff\xfe")
    (photos / "cat" / "b.txt").write_bytes(b"\xef\xbb\xbfb\n")
    faults = lenient()
    images = {image.name: image.captions for image in folder(photos, faults).images}
    assert "cat/a.jpg" not in images and images["cat/b.jpg"] == ["b"]
    assert faults.counts == {"unreadable text": 1}


def test_the_second_picture_of_a_key_is_a_fault(photos, caplog):
    (photos / "cat_a.png").write_bytes(b"")
    faults = lenient()
    images = folder(photos, faults)
    assert sorted(images.key(index) for index in range(len(images))).count("cat_a") == 1
    assert faults.counts == {"duplicate key": 1} and "cat/a.jpg has the same key" in caplog.text


def test_a_file_name_that_is_not_text_is_a_fault(photos):
    (photos / b"\xff.jpg".decode(errors="surrogateescape")).write_bytes(b"")
    faults = lenient()
    assert len(folder(photos, faults)) == 6
    assert faults.counts == {"unreadable text": 1}
