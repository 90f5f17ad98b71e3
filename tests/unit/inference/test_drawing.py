"""Drawing picture sets: what a picture is follows from seed and index, whoever draws it and however often; ranking."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from captioned_tars import contents
from PIL import Image

from megarq.data.picture_items import class_items
from megarq.data.picture_set import Item, PictureSet
from megarq.errors import ConfigError, DataError
from megarq.inference.drawing import (
    TAKE,
    Rank,
    candidate_count,
    candidates,
    draw_pictures,
    drawing_settings,
    groups,
    lay_out,
)
from megarq.inference.generator import ImageGenerator
from megarq.inference.model_folder import model_fingerprint, read_info

CAPTIONS = [Item(text, id=number) for number, text in enumerate(["two", "a seven", "red two", "a blue seven", "two"])]
KINDS = {
    "text": {},
    "class": {"cond_length": 1, "cond_vocab_size": 5},
    "none": {"cond_length": 1, "cond_vocab_size": 1},
}


def brightness(pictures: list[Image.Image], items: Sequence[Item]) -> list[float]:
    """A ranker that likes bright pictures; pictures of class 1, dark ones."""
    signs = [-1 if item.label == 1 else 1 for item in items]
    return [sign * float(np.asarray(picture).mean()) for sign, picture in zip(signs, pictures, strict=True)]


class Drawn(NamedTuple):
    """A set as it lies on disk."""

    folder: Path
    complete: bool
    records: list[dict[str, Any]]
    pixels: list[np.ndarray]


@pytest.fixture(scope="module")
def folders(build: Any, export: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: export(build(**changes), root / name) for name, changes in KINDS.items()}


@pytest.fixture
def draw(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Drawn]:
    """Draw items into a folder with a model of a kind: by default 2 pictures to a batch and 4 to a tar."""

    def go(
        items: Sequence[Item] = CAPTIONS,
        name: str = "set",
        kind: str = "text",
        rank: Rank | None = None,
        number: int = 0,
        workers: int = 1,
        **changes: Any,
    ) -> Drawn:
        settings = drawing_settings(
            *(folders[kind], read_info(folders[kind]), items),
            **{"seed": 3, "sampling": {}, "batch_size": 2, "dtype": "fp32", "threads": 1, "pictures_per_tar": 4}
            | changes,
        )
        pictures = PictureSet(tmp_path / name, settings, lay_out(items, settings))
        generator = ImageGenerator.from_pretrained(folders[kind], batch_size=settings.batch_size)
        complete = draw_pictures(generator, items, pictures, rank=rank, number=number, workers=workers, progress=False)
        return Drawn(tmp_path / name, complete, *read(tmp_path / name))

    return go


def read(folder: Path) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    records, pixels = [], []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".json"):
                    records.append(json.loads(content))
                else:
                    pixels.append(np.asarray(Image.open(io.BytesIO(content))))
    return records, pixels


def expected(folder: Path, prompts: list[str], indices: list[int], seed: int = 3) -> list[np.ndarray]:
    """The pictures of these prompts and indices, drawn one by one."""
    generator = ImageGenerator.from_pretrained(folder, batch_size=1)
    codes = generator.sample_codes(generator.conditions(prompts), seed=seed, indices=indices)
    return [np.asarray(picture) for picture in generator.decode(codes)]


def same(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> bool:
    return len(left) == len(right) and all(map(np.array_equal, left, right))


def test_a_picture_follows_from_its_item_the_seed_and_its_place(
    draw: Callable[..., Drawn], folders: dict[str, Path]
) -> None:
    drawn = draw()
    assert drawn.complete
    assert drawn.records == [{"index": n, "prompt": item.prompt, "id": n} for n, item in enumerate(CAPTIONS)]
    assert same(drawn.pixels, expected(folders["text"], [str(item.prompt) for item in CAPTIONS], list(range(5))))
    assert not np.array_equal(drawn.pixels[0], drawn.pixels[4])  # the same caption at another place


def test_a_worker_of_any_number_draws_the_same_bytes(draw: Callable[..., Drawn]) -> None:
    """Each begins with another tar."""
    items = CAPTIONS * 2
    alone = contents(draw(items, "alone").folder)
    for number in (1, 2):
        assert contents(draw(items, f"worker {number} of 3", number=number, workers=3).folder) == alone


def test_a_worker_leaves_what_another_holds(draw: Callable[..., Drawn], folders: dict[str, Path]) -> None:
    whole = contents(draw(name="whole").folder)
    (held := draw(name="held").folder / "000001.tar").unlink()
    settings = drawing_settings(
        *(folders["text"], read_info(folders["text"]), CAPTIONS),
        **{"seed": 3, "sampling": {}, "batch_size": 2, "dtype": "fp32", "threads": 1, "pictures_per_tar": 4},
    )
    busy = PictureSet(held.parent, settings, lay_out(CAPTIONS, settings)).take(0, 1)
    assert next(busy) == 1
    assert not draw(name="held").complete
    busy.close()
    assert draw(name="held").complete and contents(held.parent) == whole


def test_nothing_is_drawn_twice(draw: Callable[..., Drawn], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = draw()
    times = {path: path.stat().st_mtime_ns for path in drawn.folder.iterdir()}
    monkeypatch.setattr(ImageGenerator, "sample_codes", lambda *_, **__: pytest.fail("drawn again"))
    assert draw().complete
    assert {path: path.stat().st_mtime_ns for path in drawn.folder.iterdir()} == times


def test_batches_have_one_size_and_do_not_cross_tars(
    draw: Callable[..., Drawn], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[int]] = []
    original = ImageGenerator.sample_codes

    def watched(*args: Any, indices: list[int], **options: Any) -> torch.Tensor:
        batches.append(indices)
        return original(*args, indices=indices, **options)

    monkeypatch.setattr(ImageGenerator, "sample_codes", watched)
    draw(CAPTIONS * 2, batch_size=3, pictures_per_tar=4)
    assert batches == [[0, 1, 2], [3], [4, 5, 6], [7], [8, 9]]


def test_classes_and_no_condition_are_drawn_too(draw: Callable[..., Drawn]) -> None:
    classes = draw(class_items(7, 5), "classes", "class")
    assert [record["class"] for record in classes.records] == [0, 0, 1, 1, 2, 3, 4]
    unconditional = draw([Item()] * 3, "none", "none")
    assert unconditional.records == [{"index": n, "id": None} for n in range(3)]
    assert not np.array_equal(*unconditional.pixels[:2])


def test_settings_left_out_are_the_models_and_are_recorded(draw: Callable[..., Drawn]) -> None:
    recorded = json.loads((draw(sampling={"top_k": 5, "top_p": None}).folder / "pictures.json").read_bytes())
    assert recorded["sampling"] == {"top_k": 5, "top_p": 1.0, "temperature": 1.0, "guidance": 1.0}
    assert (recorded["model"]["weights"], recorded["model"]["step"]) == ("param", 3)
    assert (recorded["count"], recorded["resolution"], recorded["condition"]) == (5, 4, "text")


def test_a_guided_set_shows_what_the_guided_generator_draws(
    draw: Callable[..., Drawn], folders: dict[str, Path]
) -> None:
    drawn = draw(sampling={"guidance": 4.0})
    generator = ImageGenerator.from_pretrained(folders["text"], batch_size=1)
    cond = generator.conditions([str(item.prompt) for item in CAPTIONS])
    guided = generator.decode(generator.sample_codes(cond, seed=3, guidance=4.0))
    assert same(drawn.pixels, [np.asarray(picture) for picture in guided])
    assert not same(drawn.pixels, draw(name="plain").pixels)


def test_the_best_candidates_of_a_caption_are_kept(draw: Callable[..., Drawn], folders: dict[str, Path]) -> None:
    drawn = draw(rank=brightness, keep_fraction=0.25, batch_size=3)
    for place, item in enumerate(CAPTIONS):
        indices = [place + take * TAKE for take in range(4)]
        pictures = expected(folders["text"], [str(item.prompt)] * 4, indices)
        scores = [float(picture.mean()) for picture in pictures]
        best = int(np.argmax(scores))
        assert np.array_equal(drawn.pixels[place], pictures[best])
        assert drawn.records[place] == {
            "index": place,
            "prompt": item.prompt,
            "id": item.id,
            "score": scores[best],
            "candidate": indices[best],
        }


def test_the_best_candidates_of_a_class_are_kept_in_their_order(draw: Callable[..., Drawn]) -> None:
    items = class_items(8, 5)
    drawn = draw(items, "kept", "class", rank=brightness, keep_fraction=0.4)
    everything = draw(items, "all", "class", rank=lambda made, wanted: [0.0] * len(made), keep_fraction=0.4)
    plain = draw(items, "plain", "class")
    assert [record["class"] for record in drawn.records] == [item.label for item in items]
    assert [record["candidate"] for record in everything.records] == list(range(8))  # equal scores: the first
    assert same(everything.pixels, plain.pixels)
    for label, (first, count) in enumerate(((0, 2), (2, 2), (4, 2), (6, 1), (7, 1))):
        kept = drawn.records[first : first + count]
        assert [record["candidate"] for record in kept] == sorted(record["candidate"] for record in kept)
        assert {record["candidate"] % TAKE for record in kept} <= set(range(first, first + count))
        shown = [picture.mean() for picture in drawn.pixels[first : first + count]]
        assert [record["score"] for record in kept] == [-mean if label == 1 else mean for mean in shown]
    means = [float(picture.mean()) for picture in plain.pixels]
    assert sum(map(float, (picture.mean() for picture in drawn.pixels[:2]))) >= sum(means[:2])
    assert sum(map(float, (picture.mean() for picture in drawn.pixels[2:4]))) <= sum(means[2:4])


def test_ranked_sets_do_not_depend_on_workers_either(draw: Callable[..., Drawn]) -> None:
    options = {"kind": "class", "rank": brightness, "keep_fraction": 0.3, "batch_size": 4}
    alone = contents(draw(class_items(12, 5), "alone", **options).folder)
    draw(class_items(12, 5), "shared", number=1, workers=2, **options)
    assert contents(draw(class_items(12, 5), "shared", number=0, workers=2, **options).folder) == alone


def test_groups_do_not_cross_tars(draw: Callable[..., Drawn], folders: dict[str, Path]) -> None:
    items = class_items(12, 5)
    settings = drawing_settings(
        *(folders["class"], read_info(folders["class"]), items),
        **{"seed": 3, "sampling": {}, "batch_size": 2, "dtype": "fp32", "threads": 1, "pictures_per_tar": 5},
        keep_fraction=0.5,
    )
    assert groups(items, range(12)) == [range(0, 3), range(3, 6), range(6, 8), range(8, 10), range(10, 12)]
    assert lay_out(items, settings) == [range(0, 3), range(3, 8), range(8, 12)]
    with pytest.raises(ConfigError, match=r"--pictures-per-tar 2: a class has 3 pictures.*-per-tar 3 or more"):
        draw(items, kind="class", rank=brightness, keep_fraction=0.5, pictures_per_tar=2)


def test_candidates_of_a_smaller_fraction_include_those_of_a_larger() -> None:
    group = range(40, 43)
    few, many = candidates(group, 0.5), candidates(group, 0.05)
    assert many[: len(few)] == few and len(many) == 60
    assert [one.index for one in few] == [40, 41, 42, 40 + TAKE, 41 + TAKE, 42 + TAKE]
    assert [one.index for one in candidates(group, 1.0)] == [40, 41, 42]


@pytest.mark.parametrize(("kept", "fraction", "count"), [(50, 0.05, 1000), (1, 0.05, 20), (3, 0.1, 30), (1, 0.3, 4)])
def test_a_fraction_is_the_decimal_that_was_typed(kept: int, fraction: float, count: int) -> None:
    assert candidate_count(kept, fraction) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_fraction": 0.0}, r"--keep-fraction 0\.0: give a share"),
        ({"keep_fraction": 1.5}, r"--keep-fraction 1\.5: give a share"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"pictures_per_tar": 0}, "--pictures-per-tar 0"),
        ({"sampling": {"top_p": 2.0}}, r"top_p=2\.0"),
        ({"sampling": {"guidance": -1.0}}, r"guidance=-1\.0"),
        ({"items": [Item(label=1)], "kind": "class", "sampling": {"guidance": 2.0}}, r"guidance=2\.0: the model's"),
        ({"seed": "x"}, "seed='x'"),
        ({"items": [Item("two"), Item(" ")]}, "prompt ' '"),
        ({"items": [Item(label=9)], "kind": "class"}, "class=9"),
        (
            {"items": [Item()], "kind": "none", "rank": brightness, "keep_fraction": 0.5},
            "nothing ranks pictures of a model without condition",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw: Callable[..., Drawn], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(**options)


def test_scores_that_are_not_finite_are_refused(draw: Callable[..., Drawn]) -> None:
    with pytest.raises(DataError, match="the ranker gave nan for candidate 0 of picture 0"):
        draw(rank=lambda made, items: [float("nan")] * len(made), keep_fraction=0.5)


def test_a_models_fingerprint_follows_its_files_not_their_place(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["text"], moved := tmp_path / "moved")
    (moved / "README.md").write_text("edited")
    assert model_fingerprint(moved) == model_fingerprint(folders["text"])
    for name in ("config.json", "model.safetensors", "rqvae.safetensors", "tokenizer.json"):
        content = (moved / name).read_bytes()
        (moved / name).write_bytes(content + b" ")
        assert model_fingerprint(moved) != model_fingerprint(folders["text"]), name
        (moved / name).write_bytes(content)
