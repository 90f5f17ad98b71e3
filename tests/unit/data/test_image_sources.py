"""Pictures in tars, folders and LMDB: one face, and the same batches whatever they lie in."""

import io
import logging
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from megarq.data.image_sources import open_images
from megarq.data.images import ImageLoader
from megarq.data.transforms import from_pixels
from megarq.errors import DataError

KINDS = ("shards", "folder", "lmdb")
COUNT = 23


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def pictures(png: Callable[[int], bytes]) -> dict[str, bytes]:
    """23 pictures by name, in sorted order, in three classes."""
    return {f"n{number // 8}/{number:03d}": png(number) for number in range(COUNT)}


@pytest.fixture
def places(
    pictures: dict[str, bytes], make_tar: Callable[..., str], make_lmdb: Callable[..., Path], tmp_path: Path
) -> dict[str, list[str]]:
    """The same pictures in every form that --data takes."""
    by_class = [{k: v for k, v in pictures.items() if k.startswith(f"n{label}/")} for label in range(3)]
    tars = [
        make_tar(f"{label}.tar", {f"{name}.png": data for name, data in members.items()})
        for label, members in enumerate(by_class)
    ]
    files = {f"{name}.JPEG": data for name, data in pictures.items()}  # ImageNet's ending; the content decides
    folder = write_files(tmp_path / "train", files)
    entries = {name.encode(): data for name, data in reversed(pictures.items())}
    return {"shards": tars, "folder": [str(folder)], "lmdb": [str(make_lmdb("church_outdoor_train_lmdb", entries))]}


def batches(data: list[str], count: int = 4, **changes: object) -> list[Tensor]:
    options: dict[str, object] = {"transform": "imagenet", "resolution": 8, "global_batch_size": 12, "seed": 3}
    loader = ImageLoader(open_images(data), **(options | changes))  # type: ignore[arg-type]
    return [batch.images for batch in islice(loader, count)]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_is_read_under_its_name(kind, places, pictures):
    source = open_images(places[kind])
    assert [source.read(index) for index in range(len(source))] == list(pictures.values())
    names = [source.name(index)[1].removesuffix(".JPEG") for index in range(len(source))]
    assert names == list(pictures)


@pytest.mark.parametrize("kind", ["folder", "lmdb"])
def test_batches_are_those_of_shards_with_the_same_pictures(kind, places):
    assert equal(batches(places[kind]), batches(places["shards"]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_the_global_batches(kind, world_size, places):
    shares = [batches(places[kind], rank=rank, world_size=world_size) for rank in range(world_size)]
    assert equal([torch.cat(parts) for parts in zip(*shares, strict=True)], batches(places[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_workers_change_nothing(kind, places):
    in_this_process = batches(places[kind])  # the first: an LMDB opened here comes through the workers' fork
    assert equal(batches(places[kind], workers=2), in_this_process)


def test_a_loader_that_has_read_may_fork_workers(places):
    source = open_images(places["lmdb"])
    before = source.read(7)
    loader = ImageLoader(source, "none", 8, 12, workers=2)
    assert len(list(islice(loader, 3))) == 3 and source.read(7) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_resumes_at_the_state_of_a_batch(kind, places):
    loader = ImageLoader(open_images(places[kind]), "imagenet", 8, 12, seed=3)
    made = list(islice(loader, 5))
    resumed = batches(places[kind], 3, start=made[1].state)
    assert equal(resumed, [batch.images for batch in made[2:]])


def test_sources_follow_one_another(places, pictures, tmp_path, png):
    more = write_files(tmp_path / "more", {"x.png": png(90), "deep/er/y.webp": png(91)})
    source = open_images([str(more), *places["lmdb"], *places["shards"]])
    twice = [*pictures.values(), *pictures.values()]
    assert [source.read(index) for index in range(len(source))] == [png(91), png(90), *twice]
    assert source.name(0) == (str(more), "deep/er/y.webp")
    assert source.name(2) == (str(Path(places["lmdb"][0]) / "data.mdb"), "n0/000")
    assert source.name(2 + COUNT) == (places["shards"][0], "n0/000")
    assert source.name(1 + 2 * COUNT) == (places["shards"][2], "n2/022")


def test_a_source_that_is_named_twice_counts_once(places):
    assert len(open_images(places["folder"] * 2)) == COUNT


def test_the_file_of_a_database_may_be_named(places):
    assert len(open_images([f"{places['lmdb'][0]}/data.mdb"])) == COUNT


def test_a_folder_with_tars_is_one_of_shards(places, tmp_path):
    assert len(open_images([str(tmp_path)])) == COUNT  # the test's own: train/ and the database lie beside the tars


def test_other_and_hidden_files_are_left_out(tmp_path, png):
    names = ("a.png", ".b.png", "notes.txt", ".git/c.png", "d.gif", "E.JPG")
    source = open_images([str(write_files(tmp_path / "mixed", dict.fromkeys(names, png(0))))])
    assert [source.name(index)[1] for index in range(len(source))] == ["E.JPG", "a.png"]


@pytest.mark.parametrize("kind", ["BMP", "TIFF"])
def test_pictures_without_loss_of_other_formats_are_read(kind, tmp_path, make_tar):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    names = {"BMP": ["a.bmp"], "TIFF": ["a.TIF", "b.tiff"]}[kind]
    folder = write_files(tmp_path / "folder", dict.fromkeys(names, buffer.getvalue()))
    shard = make_tar("0.tar", dict.fromkeys(names, buffer.getvalue()))
    for place in (str(folder), shard):
        (images,) = batches([place], 1, transform="none", global_batch_size=len(names))
        assert len(open_images([place])) == len(names)
        assert all(torch.equal(image, from_pixels(torch.from_numpy(pixels))) for image in images)


def test_names_need_not_be_text(tmp_path, png):
    folder = write_files(tmp_path / "odd", {"a.png": png(0)})
    (folder / "a.png").rename(folder / b"\xff.png".decode(errors="surrogateescape"))
    source = open_images([str(folder)])
    assert source.read(0) == png(0) and source.name(0)[1] == "\\xff.png"


def test_a_folder_without_pictures_is_refused(tmp_path):
    write_files(tmp_path / "texts", {"a.txt": b"x"})
    with pytest.raises(DataError, match=r"no pictures below .*texts: nothing there ends in \.jpg"):
        open_images([str(tmp_path / "texts")])


def test_training_and_validation_are_not_read_together(tmp_path, png):
    write_files(tmp_path / "imagenet", {"train/n1/a.JPEG": png(0), "val/n1/b.JPEG": png(1)})
    for name in ("notes.txt", "ILSVRC2012_img_train.tar"):  # a tar beside them does not make it a folder of shards
        write_files(tmp_path / "imagenet", {name: b""})
        with pytest.raises(DataError, match=r"holds the folders train and val\. Give one of them: .*imagenet/train"):
            open_images([str(tmp_path / "imagenet")])


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        open_images([str(tmp_path / "nowhere")])


def test_nothing_is_refused():
    with pytest.raises(DataError, match="no pictures given"):
        open_images([])


def test_a_file_that_cannot_be_read_is_skipped_and_replaced(places, tmp_path, caplog):
    source = open_images(places["folder"])
    (tmp_path / "train" / "n1" / "010.JPEG").unlink()
    with caplog.at_level(logging.WARNING):
        (batch,) = islice(ImageLoader(source, "none", 8, COUNT), 1)
    assert len(torch.unique(batch.images.flatten(1), dim=0)) == COUNT - 1
    assert "skipped n1/010.JPEG in" in caplog.text and "unreadable image" in caplog.text


def test_files_that_cannot_be_read_stop_above_the_rate(places, tmp_path):
    source = open_images(places["folder"])
    for file in (tmp_path / "train").rglob("*.JPEG"):
        file.unlink()
    with pytest.raises(DataError, match=r"^11 bad samples of 11 seen"):
        next(iter(ImageLoader(source, "none", 8, COUNT)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_tells_other_lists_apart(kind, places, tmp_path, png):
    once, again = open_images(places[kind]).fingerprint(), open_images(places[kind]).fingerprint()
    more = str(write_files(tmp_path / "more", {"x.png": png(90)}))
    joined = open_images([*places[kind], more]).fingerprint()
    turned = open_images([more, *places[kind]]).fingerprint()
    assert once == again and len({once, joined, turned}) == 3
