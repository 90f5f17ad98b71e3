"""tools/sample.py --prompts-file: a folder of pictures of every caption, as tars or as files; and what it refuses."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from captioned_tars import contents
from PIL import Image
from scripts import load_script
from tiny_models import build_models, export_models

from megarq.data.pictures import open_pictures
from megarq.errors import ConfigError, DataError, MegarqError

CAPTIONS = ["a seven", "two", "a small red two"]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_script("tools/sample.py")


@pytest.fixture(scope="module")
def models(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    classes = build_models(cond_length=1, cond_vocab_size=5)
    return {
        "text": export_models(build_models(), root / "text", tokenizer_file=tokenizer_file),
        "class": export_models(classes, root / "class"),
    }


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(CAPTIONS) + "\n")
    return path


@pytest.fixture
def draw(tool: ModuleType, models: dict[str, Path], prompts: Path, tmp_path: Path) -> Callable[..., Path]:
    """`draw(*options)`: the folder that the command makes of `prompts`; later options win."""

    def go(*options: object, kind: str = "text", output: str = "set") -> Path:
        common = (models[kind], "--prompts-file", prompts, "--output", tmp_path / output, "--device", "cpu")
        tool.main([*map(str, common), "--batch-size", "2", *map(str, options)])
        return tmp_path / output

    return go


def pixels(folder: Path) -> list[np.ndarray[Any, Any]]:
    pictures = open_pictures(folder)
    return [np.asarray(Image.open(io.BytesIO(pictures[index].data))) for index in range(len(pictures))]


@pytest.mark.parametrize("form", ["png", "tar"])
def test_the_pictures_are_the_generators(
    tool: ModuleType, draw: Callable[..., Path], models: dict[str, Path], form: str
) -> None:
    folder = draw("--count", 2, "--seed", 7, "--guidance", 3, "--top-k", 5, "--format", form)
    generator = tool.ImageGenerator.from_pretrained(models["text"], batch_size=2)
    expected = generator.generate(prompts=CAPTIONS, count=2, seed=7, guidance=3.0, top_k=5)
    assert all(map(np.array_equal, pixels(folder), map(np.asarray, expected))) and len(pixels(folder)) == 6


def test_each_picture_has_its_prompt_and_settings_beside_it(draw: Callable[..., Path], prompts: Path) -> None:
    prompts.write_text("a seven\n\ntwo\n")
    folder = draw("--count", 2, "--seed", 7, "--temperature", 1.5)
    record = json.loads((folder / "000003.json").read_bytes())
    assert (record["index"], record["prompt"], record["id"], record["seed"]) == (3, "two", 3, 7)
    assert record["sampling"] == {"top_k": None, "top_p": 1.0, "temperature": 1.5, "guidance": 1.0}
    assert sorted(path.name for path in folder.glob("*.png")) == [f"{place:06d}.png" for place in range(4)]


def test_tars_are_those_that_the_evaluations_command_makes(
    draw: Callable[..., Path], models: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "list.json").write_text(
        json.dumps([{"caption": text, "id": line + 1} for line, text in enumerate(CAPTIONS)])
    )
    theirs = ["--items", tmp_path / "list.json", "--output", tmp_path / "theirs", "--batch-size", 2, "--device", "cpu"]
    theirs += ["--model", models["text"], "--top-k", 5, "--top-p", 0.9]
    load_script("evaluation/coco.py").main(list(map(str, theirs)))
    assert contents(draw("--format", "tar", "--top-k", 5, "--top-p", 0.9)) == contents(tmp_path / "theirs")


def test_what_is_missing_is_drawn_again_with_the_same_bytes(draw: Callable[..., Path]) -> None:
    whole = contents(draw("--count", 2))
    for name in ("000003.png", "000000.json", "pictures.json"):
        (draw("--count", 2) / name).unlink()
        if name == "pictures.json":
            with pytest.raises(DataError, match="but no pictures.json: give --output a folder of its own"):
                draw("--count", 2)
        else:
            assert contents(draw("--count", 2)) == whole


def test_a_long_caption_is_cut_and_told_once(
    draw: Callable[..., Path], prompts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts.write_text("a small red seven two\ntwo\n")
    draw("--count", 5)
    assert caplog.text.count("has 5 tokens; the model reads the first 4") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "two"], "--prompts-file .* and --prompt are both given"),
        (["--class", 1], "and --class are both given"),
        (["--keep-best", 1], "and --keep-best are both given"),
        (["--output", "grid.png"], r"--output is grid\.png\. Give --output DIR"),
        (["--prompts-file", "nowhere.txt"], r"nowhere\.txt cannot be read"),
        (["--count", 0], "--count 0"),
        (["--count", 10**9], r"--count 1000000000 of 3 captions: .* at most 100,000 .* as png, 1,000,000 as tar\. Use"),
        (["--count", 10**9, "--format", "tar"], "--count 1000000000 of 3 captions"),
        (["--top-k", 0], "top_k=0"),
        (["--temperature", "nan"], "temperature=nan"),
        (["--guidance", "nan"], "guidance=nan"),
        (["--batch-size", 0], "--batch-size 0"),
        (["--threads", 0], "--threads 0"),
        (["--device", "tpu"], "device='tpu'"),
        (["--device", "meta"], "device='meta' cannot be used"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_makes_no_folder(
    draw: Callable[..., Path], tmp_path: Path, options: list[object], message: str
) -> None:
    with pytest.raises(MegarqError, match=message):
        draw(*options)
    assert not (tmp_path / "set").exists()


def test_a_model_of_classes_reads_no_prompts(draw: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="draws classes, not captions"):
        draw(kind="class")


@pytest.mark.parametrize(
    ("options", "named"), [(["--seed", 1], "seed=1"), (["--count", 2], "count=6"), (["--guidance", 2], "guidance=2.0")]
)
def test_a_folder_of_other_settings_is_refused(draw: Callable[..., Path], options: list[object], named: str) -> None:
    draw()
    with pytest.raises(DataError, match=f"was begun with .*, this command has (sampling.)?{named}"):
        draw(*options)


def test_a_folder_of_other_prompts_is_refused(draw: Callable[..., Path], prompts: Path) -> None:
    draw()
    prompts.write_text("\n".join(reversed(CAPTIONS)))
    with pytest.raises(DataError, match="was begun with other prompts or classes than this command has"):
        draw()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts-file", "x"], "--prompts-file makes a folder, and --output is None. Give --output DIR"),
        (["--prompt", "two", "--format", "tar"], "--format tar without --prompts-file"),
        (["--prompt", "two", "--threads", "2"], "--threads 2 without --prompts-file"),
        (
            ["--prompt", "two", "--count", str(10**9)],
            "--count 1000000000 .* at most 10,000 pictures. Use --prompts-file",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tool: ModuleType, models: dict[str, Path], options: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tool.main([str(models["text"]), *options])
