"""tools/sample.py: one PNG, its text chunks, and bad options."""

import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from random_classifier import write_classifier
from scripts import load_script

from megarq import cli
from megarq.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def tool():
    return load_script("tools/sample.py")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Draw where the generators drew that the pictures are compared with."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def folder(build, export, tmp_path_factory):
    return str(export(build(), tmp_path_factory.mktemp("tool") / "model"))


@pytest.fixture(scope="module")
def class_folder(build, export, tmp_path_factory):
    return str(export(build(cond_length=1, cond_vocab_size=5), tmp_path_factory.mktemp("tool") / "model"))


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (["--prompt", "two", "--count", "4"], (14, 14)),
        (["--prompt", "two", "--prompt", "seven", "--count", "3"], (20, 14)),
        (["--prompt", "two"], (8, 8)),
    ],
)
def test_pictures_lie_in_a_grid_of_prompts_or_a_square(tool, folder, tmp_path, options, size):
    tool.main([folder, *options, "--output", str(tmp_path / "new" / "grid.png")])
    assert Image.open(tmp_path / "new" / "grid.png").size == size


def test_the_pictures_are_the_generators_in_reading_order(tool, folder, tmp_path):
    tool.main(
        [
            folder,
            "--prompt",
            "two",
            "--prompt",
            "red",
            "--count",
            "2",
            "--seed",
            "3",
            "--output",
            str(tmp_path / "g.png"),
        ]
    )
    pictures = tool.ImageGenerator.from_pretrained(folder).generate(prompts=["two", "red"], count=2, seed=3)
    sheet = np.asarray(Image.open(tmp_path / "g.png"))
    assert np.array_equal(sheet[8:12, 2:6], np.asarray(pictures[2]))


def test_guided_pictures_are_the_guided_generators(tool, folder, tmp_path):
    tool.main([folder, "--prompt", "two", "--guidance", "4", "--output", str(tmp_path / "g.png")])
    (picture,) = tool.ImageGenerator.from_pretrained(folder).generate(prompts=["two"], guidance=4.0)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "g.png"))[2:6, 2:6], np.asarray(picture))


def test_classes_cannot_be_guided(tool, class_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"guidance=2\.0: the model's condition is class"):
        tool.main([class_folder, "--class", "3", "--guidance", "2", "--output", str(tmp_path / "g.png")])


def test_classes_are_asked_for_by_number(tool, class_folder, tmp_path):
    tool.main([class_folder, "--class", "3", "--class", "0", "--output", str(tmp_path / "g.png")])
    assert json.loads(Image.open(tmp_path / "g.png").text["classes"]) == [3, 0]


def test_the_png_tells_how_it_was_drawn(tool, folder, tmp_path):
    options = ["--top-k", "5,4,3", "--top-p", "0.9", "--temperature", "1.2", "--guidance", "2", "--seed", "8"]
    tool.main([folder, "--prompt", "two", *options, "--output", str(tmp_path / "g.png")])
    text = Image.open(tmp_path / "g.png").text
    assert text.pop("Software") == "MegaRQ" and text.pop("dtype") == "float32"
    facts = {key: json.loads(value) for key, value in text.items()}
    model = facts.pop("model")
    assert model["name"] == Path(folder).name and {"weights", "step", "rqvae"} < model.keys()
    settings = {"temperature": 1.2, "top_k": [5, 4, 3], "top_p": 0.9, "guidance": 2, "seed": 8}
    assert facts == {"prompts": ["two"], "count": 1, **settings}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "two", "--top-k", "0"], "top_k=0"),
        (["--prompt", "two", "--top-k", "3,2"], "2 values for 3 depths"),
        (["--prompt", "two", "--temperature", "0"], "temperature=0"),
        (["--prompt", "two", "--temperature", "nan"], "temperature=nan"),
        (["--prompt", "two", "--top-p", "2"], "top_p=2"),
        (["--prompt", "two", "--guidance", "-1"], "guidance=-1"),
        (["--prompt", "two", "--count", "0"], "--count 0"),
        (["--prompt", "two", "--count", "1000000000"], "a grid holds at most 10,000"),
        (["--prompt", ""], "prompt '': give a caption"),
        (["--prompt", "a" * 1001], "prompt of 1001 characters"),
        (["--class", "2"], "classes given"),
        ([], "neither prompts nor classes"),
    ],
)
def test_a_bad_option_is_refused_and_writes_nothing(tool, folder, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        tool.main([folder, *options, "--output", str(tmp_path / "g.png")])
    assert list(tmp_path.iterdir()) == []


def test_a_class_that_does_not_exist_is_refused(tool, class_folder, tmp_path):
    with pytest.raises(ConfigError, match="class=5: this model knows classes 0 to 4"):
        tool.main([class_folder, "--class", "5", "--output", str(tmp_path / "g.png")])


def test_a_file_that_cannot_be_written_is_told_before_anything_is_drawn(tool, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "loaded", None)
    (tmp_path / "g.png").mkdir()
    with pytest.raises(IsADirectoryError):
        tool.main([folder, "--prompt", "two", "--output", str(tmp_path / "g.png")])


def test_another_kind_of_picture_file_is_refused(tool, folder, tmp_path):
    with pytest.raises(ConfigError, match=r"ends in .png"):
        tool.main([folder, "--prompt", "two", "--output", str(tmp_path / "g.jpg")])


def test_an_error_is_printed_without_traceback(tool, tmp_path, capsys):
    assert cli.run(lambda: tool.main([str(tmp_path / "nowhere"), "--prompt", "two"])) == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.fixture
def bright(tool, monkeypatch):
    """Rank by brightness."""

    def rank(pictures, items):
        assert all(item.prompt == "two" or item.label == 3 for item in items)
        return [float(np.asarray(picture).mean()) for picture in pictures]

    monkeypatch.setattr(tool, "find_ranker", lambda options, generator: rank)


@pytest.mark.parametrize("asked", [["--prompt", "two"], ["--class", "3"]], ids=["prompt", "class"])
def test_the_best_of_several_are_shown_best_first(tool, folder, class_folder, bright, tmp_path, asked):
    model = folder if asked[0] == "--prompt" else class_folder
    tool.main([model, *asked, "--count", "9", "--keep-best", "4", "--output", str(tmp_path / "g.png")])
    sheet = Image.open(tmp_path / "g.png")
    question = {"prompts": ["two"]} if asked[0] == "--prompt" else {"classes": [3]}
    pictures = tool.ImageGenerator.from_pretrained(model).generate(**question, count=9)
    means = [np.asarray(picture).mean() for picture in pictures]
    best = sorted(means, reverse=True)[:4]
    assert json.loads(sheet.text["scores"]) == pytest.approx(best) and sheet.text["keep_best"] == "4"
    assert [np.asarray(sheet)[row : row + 4, column : column + 4].mean() for row in (2, 8) for column in (2, 8)] == (
        pytest.approx(best)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "two", "--count", "2", "--keep-best", "3"], "--keep-best 3 of --count 2: give 1 to 2"),
        (["--prompt", "two", "--keep-best", "0"], "--keep-best 0 of --count 1"),
        (["--prompt", "two", "--ranker-weights", "x"], "--ranker-weights without --keep-best"),
        (["--keep-best", "1"], "without --prompt or --class"),
        (["--class", "2", "--keep-best", "1"], "classes given, but the model's condition is text"),
    ],
)
def test_what_cannot_be_ranked_is_refused(tool, folder, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        tool.main([folder, *options, "--output", str(tmp_path / "g.png")])


@pytest.mark.parametrize(("asked", "network"), [(["--prompt", "two"], "clip"), (["--class", "3"], "resnet101")])
def test_a_rankers_missing_or_other_weights_are_asked_for_by_the_tools_own_option(
    tool, folder, class_folder, tmp_path, asked, network
):
    model = folder if network == "clip" else class_folder
    common = [model, *asked, "--count", "2", "--keep-best", "1", "--output", str(tmp_path / "g.png")]
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name, said in (("none.pth", "no such file"), ("other.pth", f"no file of {network}")):
        with pytest.raises(CheckpointError, match=rf"{name}.* {said}.*Give --ranker-weights FILE: ") as caught:
            tool.main([*common, "--ranker-weights", str(tmp_path / name)])
        assert "--feature-weights" not in str(caught.value)


@pytest.mark.parametrize("classes", [4, 6])
def test_a_ranker_of_other_classes_is_refused_before_anything_is_drawn(tool, class_folder, tmp_path, classes):
    weights = write_classifier(tmp_path / "other.pth", classes)
    options = ["--class", "3", "--count", "2", "--keep-best", "1", "--ranker-weights", str(weights)]
    with (
        patch.object(tool.ImageGenerator, "generate", side_effect=AssertionError("it draws")),
        pytest.raises(ConfigError, match=f"--ranker-weights knows {classes} classes, the model has 5. Give"),
    ):
        tool.main([class_folder, *options, "--output", str(tmp_path / "g.png")])
