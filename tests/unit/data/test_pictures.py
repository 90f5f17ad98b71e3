import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from captioned_tars import picture, write_tar
from PIL import Image

from megarq.data.picture_set import PictureSettings
from megarq.data.pictures import Pictures, PixelStream, decode_plain, open_pictures
from megarq.errors import DataError

SETTINGS = PictureSettings(
    count=4,
    pictures_per_tar=2,
    condition="text",
    seed=5,
    sampling={"top_k": 1024, "top_p": 0.95, "temperature": 1.0},
    batch_size=2,
    dtype="fp32",
    threads=1,
    model={"fingerprint": "f" * 64, "name": "tiny", "weights": "ema", "step": 10},
    items="0" * 64,
    keep_fraction=1.0,
    ranker=None,
    resolution=8,
)


def write_set(folder: Path, settings: PictureSettings = SETTINGS, tars: int = 2, complete: bool = True) -> Path:
    folder.mkdir()
    for tar in range(tars):
        members = {}
        for index in (2 * tar, 2 * tar + 1):
            members[f"{index:08d}.png"] = picture(index, 8, 8)
            members[f"{index:08d}.json"] = json.dumps({"index": index, "prompt": f"picture {index}"}).encode()
        write_tar(folder / f"{tar:06d}.tar", members)
    settings.save(folder, complete)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures at two depths, with names that sort otherwise than their paths."""
    (tmp_path / "pictures" / "b").mkdir(parents=True)
    for number, name in enumerate(("z.png", "b/a.PNG", "a.jpg", "c.webp")):
        kind = {"jpg": "JPEG", "webp": "WEBP"}.get(name.rpartition(".")[2], "PNG")
        (tmp_path / "pictures" / name).write_bytes(picture(number, kind=kind))
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


def names(pictures: Pictures) -> list[str]:
    return [pictures[index].name for index in range(len(pictures))]


def test_a_folder_is_listed_by_full_path_to_any_depth(folder):
    pictures = open_pictures(folder)
    found = [str(Path(name).relative_to(folder.resolve())) for name in names(pictures)]
    assert found == ["a.jpg", "b/a.PNG", "c.webp", "z.png"]
    assert pictures.kind == "folder" and pictures.lossy and pictures[0].prompt is None
    assert pictures[3].data == (folder / "z.png").read_bytes()


def test_tars_are_listed_in_order_with_their_first_captions(tmp_path):
    record = json.dumps({"captions": ["one", "two"]}).encode()
    write_tar(tmp_path / "0.tar", {"a.png": picture(0), "a.txt": b"a cat\n", "b.png": picture(1), "b.json": record})
    write_tar(tmp_path / "1.tar", {"c.jpg": picture(2, kind="JPEG"), "d.cls": b"1", "e.png": picture(3)[:40]})
    with pytest.raises(DataError, match=r"1\.tar' has faults \(1 no image; named in the log\)"):
        open_pictures(tmp_path)
    write_tar(tmp_path / "1.tar", {"c.jpg": picture(2, kind="JPEG")})
    for given in (tmp_path, f"{tmp_path}/*.tar", f"{tmp_path}/{{0..1}}.tar"):
        pictures = open_pictures(given)
        assert names(pictures) == [f"{tmp_path}/0.tar/a", f"{tmp_path}/0.tar/b", f"{tmp_path}/1.tar/c"]
        assert [pictures[index].prompt for index in range(3)] == ["a cat", "one", None]
    assert pictures.lossy and pictures.kind == "shards"


@pytest.mark.parametrize(("name", "lossy"), [("a.bmp", False), ("a.tiff", False), ("a.PNG", False), ("a.JPG", True)])
def test_which_formats_lose_something(tmp_path, name, lossy):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / name).write_bytes(b"")
    write_tar(tmp_path / "one.tar", {name: b""})
    assert open_pictures(tmp_path / "one").lossy == open_pictures(tmp_path / "one.tar").lossy == lossy


def test_a_set_is_listed_with_prompts_and_settings(tmp_path):
    pictures = open_pictures(write_set(tmp_path / "set"))
    assert [pictures[index].prompt for index in range(4)] == [f"picture {index}" for index in range(4)]
    assert pictures.kind == "set" and not pictures.lossy
    assert pictures.settings is not None and pictures.settings["model"]["weights"] == "ema"


def test_an_lmdb_is_listed_by_its_keys(make_lmdb):
    encoded = {b"b": picture(0), b"a": picture(1)}
    pictures = open_pictures(make_lmdb("val_lmdb", encoded))
    assert (pictures.kind, len(pictures), pictures[0].data, pictures[0].prompt) == ("lmdb", 2, encoded[b"a"], None)
    assert pictures[0].name.endswith("val_lmdb/data.mdb/a")
    assert [len(batch.names) for batch in PixelStream(pictures, 1, workers=4)] == [1, 1]


def test_an_lmdb_with_a_damaged_page_is_refused(make_lmdb):
    encoded = {f"{number}".encode(): picture(number) + bytes(9000) for number in range(3)}
    database = make_lmdb("val_lmdb", encoded)
    pictures = open_pictures(database)
    whole = (database / "data.mdb").read_bytes()
    place = whole.index(encoded[b"1"]) - 16
    (database / "data.mdb").write_bytes(whole[:place] + b"\xff" * 16 + whole[place + 16 :])
    with pytest.raises(DataError, match="cannot be read as an LMDB"):
        pictures[1]
    with pytest.raises(DataError, match="damaged pages hide 1 of 3 pictures: scores over a part of them"):
        open_pictures(database)


def test_several_sources_follow_one_another(folder, tmp_path):
    write_tar(tmp_path / "0.tar", {"x.png": picture(7), "x.txt": b"seven"})
    pictures = open_pictures(folder, tmp_path / "0.tar", folder)
    assert names(pictures) == [*names(open_pictures(folder)), f"{tmp_path}/0.tar/x", *names(open_pictures(folder))]
    assert pictures[4].prompt == "seven" and pictures.lossy
    assert (pictures.kind, pictures.source) == ("several", f"{folder} {tmp_path / '0.tar'} {folder}")


def write_loose(folder: Path, count: int = 4) -> Path:
    folder.mkdir()
    for index in range(count):
        (folder / f"{index:06d}.png").write_bytes(picture(index, 8, 8))
        (folder / f"{index:06d}.json").write_text(json.dumps({"index": index, "prompt": f"picture {index}"}))
    replace(SETTINGS, pictures_per_tar=None).save(folder, True)
    return folder


def test_a_set_without_tars_is_listed_with_prompts_and_settings(tmp_path):
    pictures = open_pictures(write_loose(tmp_path / "set"))
    assert [pictures[index].prompt for index in range(len(pictures))] == [f"picture {index}" for index in range(4)]
    assert pictures[3].data == picture(3, 8, 8)
    assert pictures.settings is not None and pictures.settings["seed"] == 5


def test_a_set_without_tars_that_lacks_something_is_refused(tmp_path):
    with pytest.raises(DataError, match="3 of 4 pictures are there"):
        open_pictures(write_loose(tmp_path / "three", count=3))
    pictures = open_pictures(write_loose(tmp_path / "set"))
    (tmp_path / "set" / "000001.json").unlink()
    with pytest.raises(DataError, match="000001.json cannot be read"):
        pictures[1]


def test_a_set_with_fewer_pictures_than_captions_is_refused(tmp_path):
    with pytest.raises(DataError, match="2 of 4 pictures are there: fewer pictures than captions. Run the command"):
        open_pictures(write_set(tmp_path / "set", tars=1))


def test_a_set_that_is_not_complete_is_refused(tmp_path):
    with pytest.raises(DataError, match="4 of 4 pictures are there: it is not complete. Run the command"):
        open_pictures(write_set(tmp_path / "set", complete=False))
    with pytest.raises(DataError, match="0 of 9 pictures are there: fewer pictures than captions"):
        open_pictures(write_set(tmp_path / "none", replace(SETTINGS, count=9), tars=0))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([], "no pictures in .*: nothing in it or below it ends in"),
        (["a.png", "b.tar"], "holds image files and tars. Name the tars"),
    ],
)
def test_a_folder_of_nothing_or_of_two_kinds_is_refused(tmp_path, made, message):
    for name in made:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=message):
        open_pictures(tmp_path)


def test_what_is_missing_or_empty_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder. Give a folder"):
        open_pictures(tmp_path / "nowhere")
    write_tar(tmp_path / "a.tar", {"a.txt": b"no picture"})
    with pytest.raises(DataError, match="has faults"):
        open_pictures(tmp_path / "a.tar")
    write_tar(tmp_path / "b.tar", {"a.md": b"no picture"})
    with pytest.raises(DataError, match="no pictures in .*: its 1 tars have no member that ends in"):
        open_pictures(tmp_path / "b.tar")


def test_a_torn_shard_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.png": picture(0), "b.png": picture(1)})
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:1300])
    with pytest.raises(DataError, match="has faults .*1 truncated shard.*Copy or make it again"):
        open_pictures(tmp_path / "a.tar")


def stream_of(folder: Path, *sizes: tuple[int, int], **options: object) -> PixelStream:
    folder.mkdir()
    for number, size in enumerate(sizes):
        (folder / f"{number}.png").write_bytes(picture(number, *size))
    return PixelStream(open_pictures(folder), 2, workers=3, **options)  # type: ignore[arg-type]


def test_a_stream_gives_all_pixels_in_order_and_hashes_the_files(tmp_path):
    stream = stream_of(tmp_path / "pictures", *[(10, 8)] * 5, view=lambda image: torch.tensor(image.size))
    batches = list(stream)
    assert [list(batch.pixels.shape) for batch in batches] == [[2, 3, 8, 10], [2, 3, 8, 10], [1, 3, 8, 10]]
    assert batches[0].views is not None and batches[0].views.tolist() == [[10, 8], [10, 8]]
    for number in range(5):
        expected = np.asarray(Image.open(io.BytesIO(picture(number))))
        assert np.array_equal(batches[number // 2].pixels[number % 2].permute(1, 2, 0).numpy(), expected)
    assert stream.size == (10, 8)
    assert stream.sha256 == hashlib.sha256(b"".join(picture(number) for number in range(5))).hexdigest()


def test_mixed_sizes_are_named(tmp_path):
    with pytest.raises(DataError, match=r"two sizes: .*/0\.png is 10x8, .*/2\.png is 8x10. .*--reference-transform"):
        list(stream_of(tmp_path / "pictures", (10, 8), (10, 8), (8, 10)))


def test_a_transform_brings_pictures_to_one_size(tmp_path):
    stream = stream_of(tmp_path / "pictures", (10, 8), (8, 10), transform="center", resolution=6)
    assert [list(batch.pixels.shape) for batch in stream] == [[2, 3, 6, 6]]


def test_an_unreadable_picture_is_named(tmp_path):
    stream = stream_of(tmp_path / "pictures", (10, 8))
    (tmp_path / "pictures" / "0.png").write_bytes(picture(0)[:60])
    with pytest.raises(
        DataError, match=r"picture .*/0\.png: not a readable picture of 60 bytes .*Replace or remove it"
    ):
        list(stream)


def test_pictures_are_decoded_as_other_evaluators_do():
    transparent = Image.new("RGBA", (4, 4), (200, 10, 10, 0))
    buffer = io.BytesIO()
    transparent.save(buffer, "PNG")
    assert decode_plain(buffer.getvalue()).getpixel((0, 0)) == (200, 10, 10)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_pictures_that_other_evaluators_would_clip_to_white_are_refused(dtype):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 300, dtype)).save(buffer, "TIFF")
    with pytest.raises(DataError, match="of more than 8 bits, which evaluators clip to white"):
        decode_plain(buffer.getvalue())


def test_bytes_of_no_known_format_are_told_so():
    with pytest.raises(DataError, match=r"^not a readable picture of 4 bytes \(no known format\)\. Replace"):
        decode_plain(b"text")
