"""evaluation/coco.py, cc3m.py and class_conditional.py: what each draws, ranking, and what each refuses."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from random_classifier import write_classifier
from scripts import load_script
from tiny_models import build_models, export_models

from megarq.data.faults import Faults
from megarq.data.image_shards import scan_samples
from megarq.data.picture_set import Item, PictureSettings
from megarq.errors import CheckpointError, ConfigError, DataError
from megarq.scoring import rankers

KINDS = {"class": {"cond_length": 1, "cond_vocab_size": 5}, "none": {"cond_length": 1, "cond_vocab_size": 1}}


class Brightness:
    """A ranker that likes bright pictures."""

    network, sha256 = "brightness", "0" * 64

    def __init__(self, weights: Path | None, device: object, classes: int | None = None) -> None:
        self.weights = weights

    def __call__(self, pictures: Sequence[Image.Image], items: Sequence[Item]) -> list[float]:
        return [float(np.asarray(picture).mean()) for picture in pictures]


def load(name: str, ranker: type | None = Brightness) -> ModuleType:
    with patch.multiple(rankers, ClipRanker=ranker, ClassRanker=ranker) if ranker else nullcontext():
        return load_script(f"evaluation/{name}.py")


@pytest.fixture(scope="module")
def models(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    text = export_models(build_models(), root / "text", tokenizer_file=tokenizer_file)
    return {"text": text} | {kind: export_models(build_models(**KINDS[kind]), root / kind) for kind in KINDS}


@pytest.fixture
def run(models: dict[str, Path], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`run(script, kind, *options)`: what the pictures that it drew are said to be."""

    def go(script: str, kind: str, *options: object, ranker: type | None = Brightness) -> list[dict[str, Any]]:
        load(script, ranker).main(["--model", str(models[kind]), "--output", str(tmp_path / "set"), *map(str, options)])
        assert PictureSettings.load(tmp_path / "set")[1]
        return records(tmp_path / "set")

    return go


def records(folder: Path) -> list[dict[str, Any]]:
    found = []
    for tar in sorted(folder.glob("*.tar")):
        for _, parts in scan_samples(str(tar), Faults(0), lambda tar, member: tar.extractfile(member).read()):  # type: ignore
            found.append(json.loads(parts["json"]))
    return found


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """COCO's annotations of six images with two captions each."""
    notes = [{"image_id": image, "caption": text} for text in ("a seven", "red two") for image in range(6)]
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"annotations": notes}))
    return path


def test_coco_draws_captions_of_different_images_as_the_authors_sample(
    run: Callable[..., Any], captions: Path, tmp_path: Path
) -> None:
    found = run("coco", "text", "--captions", captions, "--count", 6)
    assert {record["id"] for record in found} == set(range(6))
    settings, _ = PictureSettings.load(tmp_path / "set")
    assert settings.sampling == {"top_k": 1024, "top_p": 0.95, "temperature": 1.0, "guidance": 1.0}


def test_coco_takes_a_list_as_it_is(run: Callable[..., Any], captions: Path, tmp_path: Path) -> None:
    found = run("coco", "text", "--items", captions)
    assert [(record["id"], record["prompt"]) for record in found] == [(image, "a seven") for image in range(6)]


def test_cc3m_draws_every_caption_with_the_models_sampling(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "val.tsv").write_text("a seven\thttp://a/1\nred two\thttp://a/2\n")
    assert run("cc3m", "text", "--captions", tmp_path / "val.tsv") == [
        {"index": 0, "prompt": "a seven", "id": 0},
        {"index": 1, "prompt": "red two", "id": 1},
    ]
    assert PictureSettings.load(tmp_path / "set")[0].sampling["top_p"] == 1.0


def test_classes_are_drawn_equally_often(run: Callable[..., Any]) -> None:
    found = run("class_conditional", "class", "--count", 12)
    assert Counter(record["class"] for record in found) == {0: 3, 1: 3, 2: 2, 3: 2, 4: 2}


def test_a_model_without_condition_is_drawn_from(run: Callable[..., Any]) -> None:
    assert len(run("class_conditional", "none", "--count", 3)) == 3


@pytest.mark.parametrize(("script", "kind"), [("coco", "text"), ("cc3m", "text"), ("class_conditional", "class")])
def test_the_best_of_several_are_kept(
    run: Callable[..., Any], captions: Path, tmp_path: Path, script: str, kind: str
) -> None:
    (tmp_path / "val.tsv").write_text("a seven\thttp://a/1\n" * 5)
    source = {"coco": ["--items", captions], "cc3m": ["--captions", tmp_path / "val.tsv"]}.get(script, [])
    found = run(script, kind, *source, "--count", 5, "--keep-fraction", 0.5)
    assert len(found) == 5 and all(record["score"] > 0 and "candidate" in record for record in found)
    settings, _ = PictureSettings.load(tmp_path / "set")
    assert settings.keep_fraction == 0.5 and settings.ranker == {"network": "brightness", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("script", "kind", "network"), [("coco", "text", "clip"), ("class_conditional", "class", "resnet101")]
)
def test_a_rankers_missing_or_other_weights_are_asked_for_by_the_commands_own_option(
    models: dict[str, Path], captions: Path, tmp_path: Path, script: str, kind: str, network: str
) -> None:
    source = ["--items", str(captions)] if script == "coco" else ["--count", "5"]
    common = ["--model", str(models[kind]), "--output", str(tmp_path / "set"), *source, "--keep-fraction", "0.5"]
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name, said in (("none.pth", "no such file"), ("other.pth", f"no file of {network}")):
        with pytest.raises(CheckpointError, match=rf"{name}.* {said}.*Give --ranker-weights FILE: ") as caught:
            load(script, ranker=None).main([*common, "--ranker-weights", str(tmp_path / name)])
        assert "--feature-weights" not in str(caught.value)


@pytest.mark.parametrize("classes", [4, 6])
def test_a_ranker_of_other_classes_is_refused_before_anything_is_drawn(
    models: dict[str, Path], tmp_path: Path, classes: int
) -> None:
    weights = write_classifier(tmp_path / "other.pth", classes)
    command = ["--model", models["class"], "--output", tmp_path / "set", "--count", 5, "--keep-fraction", 0.5]
    with pytest.raises(ConfigError, match=f"--ranker-weights knows {classes} classes, the model has 5. Give"):
        load("class_conditional", ranker=None).main([*map(str, command), "--ranker-weights", str(weights)])
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("script", "kind", "options", "message"),
    [
        ("coco", "class", ["--items", "x"], "draws classes, not captions. Use evaluation/class_conditional.py"),
        ("cc3m", "none", ["--captions", "x"], "draws pictures without condition, not captions"),
        ("class_conditional", "text", [], "draws captions, not classes or .* Use evaluation/coco.py or cc3m.py"),
        ("coco", "text", [], "--captions and --items: give one of both"),
        ("coco", "text", ["--captions", "x", "--items", "y"], "give one of both"),
        ("class_conditional", "class", ["--keep-fraction", 0], r"--keep-fraction 0\.0: give a share above 0"),
        ("class_conditional", "class", ["--keep-fraction", 1.1], r"--keep-fraction 1\.1: give a share above 0"),
        ("class_conditional", "class", ["--ranker-weights", "x"], "--ranker-weights without --keep-fraction"),
        ("class_conditional", "none", ["--keep-fraction", 0.5], "nothing ranks pictures of a model without condition"),
        ("class_conditional", "class", ["--keep-fraction", 0.5, "--top-k", 0], "top_k=0"),
        ("class_conditional", "class", ["--keep-fraction", 0.5, "--pictures-per-tar", 9], "--pictures-per-tar 9: a cl"),
        ("class_conditional", "class", ["--count", 0], "--count 0: give 1 to 1,000,000"),
        ("class_conditional", "none", ["--count", 10**9], "--count 1000000000: give 1 to 1,000,000"),
        ("class_conditional", "class", ["--threads", 0], "--threads 0: use 1 or more"),
        ("class_conditional", "class", ["--device", "tpu"], "device='tpu' cannot be used"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    run: Callable[..., Any], tmp_path: Path, script: str, kind: str, options: list[object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(script, kind, *options, ranker=None)  # whose weights are nowhere
    assert not (tmp_path / "set").exists()


def test_every_sampling_option_is_recorded(run: Callable[..., Any], captions: Path, tmp_path: Path) -> None:
    asked = ("--top-k", "5,4,3", "--top-p", 0.9, "--temperature", 1.5, "--guidance", 3)
    run("coco", "text", "--items", captions, *asked)
    found = PictureSettings.load(tmp_path / "set")[0].sampling
    assert found == {"top_k": [5, 4, 3], "top_p": 0.9, "temperature": 1.5, "guidance": 3.0}


def test_fewer_captions_than_30000_are_an_error(run: Callable[..., Any], captions: Path) -> None:
    with pytest.raises(DataError, match="has 12 captions of 6 images, fewer than --count 30000. Use --count 12"):
        run("coco", "text", "--captions", captions)


def test_a_folder_of_another_set_is_refused(run: Callable[..., Any]) -> None:
    run("class_conditional", "class", "--count", 5)
    with pytest.raises(DataError, match="was begun with count=5, this command has count=6"):
        run("class_conditional", "class", "--count", 6)


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not an exported model"):
        load("class_conditional").main(["--model", str(tmp_path), "--output", str(tmp_path / "set")])


def test_many_long_captions_are_told_in_one_line(
    run: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    captions = [f"a small red seven {word}" for word in ("two", "red", "blue", "a", "seven", "small")]
    (tmp_path / "list.json").write_text(json.dumps([*captions, "two", *captions]))
    with caplog.at_level(logging.WARNING):
        run("coco", "text", "--items", tmp_path / "list.json")
    assert caplog.text.count("has 5 tokens; the model reads the first 4") == 3
    assert "6 of 7 prompts have more tokens than the model reads (4)" in caplog.text
