"""Captions and pictures of an evaluation set planted in training data are found; near misses are not."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from captioned_tars import picture, small_rqvae
from tiny_codes import image_tar, tiny_codes

from megarq.errors import ConfigError, DataError
from megarq.pretokenize.overlap import CaptionIndex, PictureIndex, normalized, read_captions

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man,  riding a HORSE.\n", "a man riding a horse"),
        ("Ｔｗｏ “café”—tables", "two café tables"),
        ("cafe\u0301 STRASSE straße", "café strasse strasse"),
        ("snake_case & 3.5", "snake case 3 5"),
        ("...", ""),
    ],
)
def test_captions_are_compared_by_their_words_alone(caption: str, expected: str) -> None:
    assert normalized(caption) == expected


def test_captions_of_few_words_are_left_out_and_counted() -> None:
    index = CaptionIndex(["a dog", "...", "a dog on a beach", "A dog on a beach!"], min_words=4)
    assert (len(index), index.too_short) == (1, 2)
    assert index.find(["a dog"]) is None and index.find(["x", "A Dog on a  beach"]) == "a dog on a beach"
    assert index.find(["a dog on a beach at night"]) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("coco.json", json.dumps({"annotations": [{"image_id": 1, "caption": "a b"}, {"caption": "c"}]})),
        ("list.json", '["a b", "c"]'),
        ("lines.txt", "\ufeffa b\nc\n"),
        ("table.csv", 'image,caption\n1.jpg,"a b"\n2.jpg,c\n'),
        ("table.tsv", "caption\turl\na b\tx\nc\ty\n"),
    ],
)
def test_captions_are_read_from_every_format(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert [caption.strip() for caption in read_captions([str(tmp_path / name)])] == ["a b", "c"]


def test_captions_are_read_from_image_shards(tmp_path: Path) -> None:
    tars = [image_tar(tmp_path / f"{n}.tar", [("k", picture(n), f"caption {n}")]) for n in range(2)]
    assert list(read_captions([str(tmp_path / "{0..1}.tar")])) == ["caption 0", "caption 1"] and len(tars) == 2


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", '{"images": []}'), ("a.json", "[1]"), ("a.csv", "text\nx\n"), ("a.json", "{")]
)
def test_a_caption_file_of_another_kind_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="no captions can be read from it"):
        list(read_captions([str(tmp_path / name)]))


@pytest.mark.parametrize("share", [1.0, 0.9, 0.75])
def test_pictures_are_found_exactly_as_by_comparing_all_pairs(share: float) -> None:
    random = np.random.default_rng(0)
    evaluation = random.integers(0, 500, (40, 8, 8, 4))
    training = random.integers(0, 500, (400, 8, 8, 4)).astype(np.uint16)
    for row in range(300):  # copies with 0 .. 19 places changed
        copy = evaluation[row % 40].reshape(64, 4).copy()
        copy[random.choice(64, row // 15, replace=False), 0] += 1
        training[row] = copy.reshape(8, 8, 4)
    index = PictureIndex([str(number) for number in range(40)], torch.from_numpy(evaluation), share)
    equal = (training[:, None, ..., 0] == evaluation[None, ..., 0]).mean((2, 3))
    expected = {
        int(row): f"{equal[row].argmax()} ({equal[row].max():.0%})" for row in np.flatnonzero(equal.max(1) >= share)
    }
    assert index.find(training) == expected and len(expected) > 10


def test_plain_pictures_are_left_out_and_counted() -> None:
    plain = torch.zeros(3, 8, 8, 4, dtype=torch.int64)
    index = PictureIndex(["a", "b", "c"], plain)
    assert (len(index), index.plain) == (0, 3) and index.find(plain.numpy().astype(np.uint16)) == {}


def test_a_share_that_would_compare_everything_is_refused() -> None:
    with pytest.raises(DataError, match=r"--share 0\.1"):
        PictureIndex([], torch.zeros(0, 8, 8, 4), 0.1)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("find_overlap_tool", ROOT / "tools" / "find_overlap.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(tool: ModuleType, tmp_path: Path) -> Callable[..., str]:
    """Find overlap with a training set of 6 samples in two shards, and give the list that was written.

    Of the evaluation set, picture 103 stands there as 000000.tar/b3, and a caption as 000001.tar/b4.
    """
    captions = ["a cat on a mat", "a red bus", "two men in a boat", "a bird in a tree", "A  Cat, on a rug!", "a dog"]
    tars = [
        image_tar(tmp_path / f"{shard}.tar", [(f"b{n}", picture(100 + n), captions[n]) for n in rows])
        for shard, rows in enumerate(((0, 1, 2, 3), (4, 5)))
    ]
    codes = tiny_codes(tmp_path / "codes", tars, small_rqvae(0))
    image_tar(tmp_path / "val.tar", [("v1", picture(1), ""), ("v2", picture(103), ""), ("v3", picture(3), "")])
    (tmp_path / "val.txt").write_text("a cat on a rug\na dog\na cat on the mat\n")

    def run(*arguments: str) -> str:
        given = [argument.replace("VAL", str(tmp_path / "val")) for argument in arguments]
        tool.main([str(codes), *given, "--output", str(tmp_path / "exclude.txt"), "--device", "cpu"])
        return (tmp_path / "exclude.txt").read_text()

    return run


def listed(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("# ")]


def test_planted_captions_and_pictures_are_listed_with_their_reasons(
    command: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = command("--captions", "VAL.txt", "--images", "VAL.tar")
    assert listed(text) == ["000000.tar/b3", "000001.tar/b4"]
    assert "# picture: val.tar/v2 (100%)\n000000.tar/b3" in text and "# caption: a cat on a rug\n000001.tar/b4" in text
    printed = capsys.readouterr().out
    assert "2 samples in" in printed and "1 by caption, 1 by picture" in printed
    assert "1 of fewer than 4 words left out" in printed


@pytest.mark.parametrize("workers", ["0", "2"])
def test_shorter_captions_match_when_asked_to(command: Callable[..., str], workers: str) -> None:
    text = command("--captions", "VAL.txt", "--min-words", "2", "--workers", workers)
    assert listed(text) == ["000001.tar/b4", "000001.tar/b5"]


def test_the_command_wants_captions_or_images(command: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match="neither --captions nor --images"):
        command()


def test_a_damaged_code_shard_stops_the_search(command: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "codes" / "000000.tar"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"000000\.tar cannot be read"):
        command("--captions", "VAL.txt")
