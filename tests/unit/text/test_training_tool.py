import io
import json
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

from megarq.errors import DataError
from megarq.text.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/train_text_tokenizer.py as a module."""
    return load_script("tools/train_text_tokenizer.py")


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """One tar of two samples: a .txt caption, and two captions in a .json."""
    members = {
        "0.png": b"not decoded here",
        "0.txt": b"a handwritten seven",
        "1.png": b"not decoded here",
        "1.json": json.dumps({"captions": ["a handwritten nine", "the digit nine"]}).encode(),
    }
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(tmp_path / "*.tar")


def test_captions_of_both_kinds_are_read(
    tool: ModuleType, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.main(["--data", shards, "--vocab-size", "100", "--output", str(tmp_path / "tokenizer.json")])
    assert "from 3 captions" in capsys.readouterr().out


def test_a_vocabulary_that_is_not_filled_is_told(
    tool: ModuleType, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tokenizer.json"
    tool.main(["--data", shards, "--vocab-size", "5000", "--output", str(output)])
    assert f"model.cond_vocab_size={TextTokenizer.load(output).vocab_size} or more" in capsys.readouterr().out


def test_a_text_file_gives_a_caption_per_line(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "captions.txt").write_text("a seven\na nine\n\na seven\n", encoding="utf-8")
    tool.main(["--text", str(tmp_path / "captions.txt"), "--output", str(tmp_path / "tokenizer.model")])
    assert "from 3 captions" in capsys.readouterr().out


def test_a_missing_text_file_is_named(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt cannot be read"):
        tool.main(["--text", str(tmp_path / "gone.txt"), "--output", str(tmp_path / "tokenizer.json")])
