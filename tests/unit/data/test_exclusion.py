"""Lists of samples to leave out."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from megarq.data.code_shards import CodeShards
from megarq.data.exclusion import excluded_samples
from megarq.errors import DataError

MakeCodes = Callable[..., CodeShards]


def test_keys_are_left_out_of_the_shard_that_is_named_or_of_all(
    make_codes: MakeCodes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    codes, other = make_codes([[30, 7], [12]]), make_codes([[50]], name="other")
    both, one = tmp_path / "both.txt", tmp_path / "one.txt"
    both.write_text("# a list\n\nkey31\r\n000001.tar/key40\n000001.tar/key3\nnowhere\n#key\n")
    one.write_text("key2\n000000.tar/key5")
    with caplog.at_level(logging.WARNING):
        samples = excluded_samples([codes, other], [[both, one], [both]])
    assert [numbers.tolist() for numbers in samples] == [[2, 5, 31, 40], [31]]
    assert "4 of 49 samples are left out" in caplog.text and "1 of 50 samples are left out" in caplog.text
    assert "both.txt: 3 of 5 keys are in no shard, such as #key, 000001.tar/key3, nowhere" in caplog.text
    assert "one.txt" not in caplog.text


def test_only_the_shards_that_are_named_are_read(make_codes: MakeCodes, tmp_path: Path) -> None:
    codes, listed = make_codes([[3], [2]]), tmp_path / "list.txt"
    listed.write_text("000001.tar/key4")
    (codes.folder / "000000.tar").unlink()
    assert excluded_samples([codes], [[listed]])[0].tolist() == [4]


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_list_that_cannot_be_read_is_an_error(make_codes: MakeCodes, tmp_path: Path, content: bytes | None) -> None:
    listed = tmp_path / "list.txt"
    if content is not None:
        listed.write_bytes(content)
    with pytest.raises(DataError, match=r"list\.txt cannot be read"):
        excluded_samples([make_codes([[3]])], [[listed]])
