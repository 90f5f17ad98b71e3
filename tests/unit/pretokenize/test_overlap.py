"""Captions and pictures of an evaluation set planted in training data are found; near misses are not."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from captioned_tars import picture, small_rqvae
from PIL import Image
from scripts import load_script
from tiny_codes import image_tar, tiny_codes

from megarq.errors import ConfigError, DataError
from megarq.pretokenize.overlap import CaptionIndex, PictureIndex, grey_steps, normalized, read_captions


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


@pytest.mark.parametrize("share", [1.0, 0.9, 0.8])
def test_pictures_are_found_exactly_as_by_comparing_all_pairs(share: float) -> None:
    random = np.random.default_rng(0)
    evaluation = random.choice(np.float32([-9, 9]), (40, 128))
    training = random.choice(np.float32([-9, 9]), (400, 128))
    for row in range(300):  # copies with 0 .. 29 bits changed
        training[row] = evaluation[row % 40]
        training[row, random.choice(128, row // 10, replace=False)] *= -1
    index = PictureIndex([str(number) for number in range(40)], evaluation, share)
    equal = (training[:, None] == evaluation[None]).mean(2)
    expected = {
        int(row): f"{equal[row].argmax()} ({equal[row].max():.0%})" for row in np.flatnonzero(equal.max(1) >= share)
    }
    assert index.find(training) == expected and len(expected) >= 10


def test_plain_pictures_are_left_out_and_counted() -> None:
    plain = np.array([grey_steps(Image.new("RGB", (40, 30), colour)) for colour in ("white", "black", "red")])
    index = PictureIndex(["a", "b", "c"], plain)
    assert (len(index), index.plain) == (0, 3) and index.find(plain) == {}


def test_a_share_that_would_compare_everything_is_refused() -> None:
    with pytest.raises(DataError, match=r"--share 0\.1"):
        PictureIndex([], np.zeros((0, 128), np.float32), 0.1)


def copied(png: bytes, size: tuple[int, int], quality: int) -> bytes:
    """The picture at another size, as a JPEG."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.resize(size).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_script("tools/find_overlap.py")


@pytest.fixture
def command(tool: ModuleType, tmp_path: Path) -> Callable[..., str]:
    """Find overlap with a training set of 6 samples in two shards, and give the list that was written.

    Of the evaluation set, picture 103 stands there as 000000.tar/b3, larger and less compressed, and a caption as
    000001.tar/b4. The codes are of crops made by chance.
    """
    captions = ["a cat on a mat", "a red bus", "two men in a boat", "a bird in a tree", "A  Cat, on a rug!", "a dog"]
    tars = [
        image_tar(tmp_path / f"{shard}.tar", [(f"b{n}", picture(100 + n, 120, 96), captions[n]) for n in rows])
        for shard, rows in enumerate(((0, 1, 2, 3), (4, 5)))
    ]
    codes = tiny_codes(tmp_path / "codes", tars, small_rqvae(0), transform="t2i")
    val = [picture(1, 60, 90), copied(picture(103, 120, 96), (80, 64), 60), picture(3, 60, 90)]
    image_tar(tmp_path / "val.tar", [(f"v{number}", image, "") for number, image in enumerate(val, 1)])
    (tmp_path / "val.txt").write_text("a cat on a rug\na dog\na cat on the mat\n")

    def run(*arguments: str) -> str:
        given = [argument.replace("HERE", str(tmp_path)) for argument in arguments]
        tool.main([str(codes), *given, "--output", str(tmp_path / "exclude.txt")])
        return (tmp_path / "exclude.txt").read_text()

    return run


def listed(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("# ")]


PICTURES = ("--images", "HERE/val.tar", "--training-images", "HERE/{0..1}.tar")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_planted_captions_and_pictures_are_listed_with_their_reasons(
    command: Callable[..., str], capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    text = command("--captions", "HERE/val.txt", *PICTURES, "--workers", workers)
    assert listed(text) == ["000000.tar/b3", "000001.tar/b4"]
    assert re.search(r"# picture: .*val\.tar/v2 \(\d+%\)\n000000\.tar/b3", text)
    assert "# caption: a cat on a rug\n000001.tar/b4" in text
    printed = capsys.readouterr().out
    assert "2 samples in" in printed and "1 by caption, 1 by picture" in printed
    assert "1 of fewer than 4 words left out" in printed


def test_pictures_are_not_searched_in_part_of_the_sources(command: Callable[..., str]) -> None:
    with pytest.raises(DataError, match=r"1 of the 2 image shards of .*1\.tar', are not among --training-images"):
        command(*PICTURES[:3], "HERE/0.tar")


def test_pictures_want_the_training_images(command: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match="crops made by chance"):
        command(*PICTURES[:2])


def test_shorter_captions_match_when_asked_to(command: Callable[..., str]) -> None:
    text = command("--captions", "HERE/val.txt", "--min-words", "2")
    assert listed(text) == ["000001.tar/b4", "000001.tar/b5"]


def test_the_command_wants_captions_or_images(command: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match="neither --captions nor --images"):
        command()


def test_a_damaged_code_shard_stops_the_search(command: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "codes" / "000000.tar"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"000000\.tar has 1000 bytes"):
        command("--captions", "HERE/val.txt")
