"""What ranks see of files, by threads that play them; hosts with disks of their own are in tests/distributed."""

from collections.abc import Callable
from typing import Any

import pytest
from made_up_checkpoints import Ranks

from megarq.errors import PreflightError
from megarq.launch.disks import check_folder, check_readable, check_same_files
from megarq.launch.gather import Gather

HOSTS = ["node1", "node2", "node3"]


def everywhere(work: Callable[[int, Gather], Any]) -> None:
    """All ranks end alike."""
    answers = Ranks(len(HOSTS)).run(work)
    assert len({(type(answer), str(answer)) for answer in answers}) == 1, answers
    if isinstance(answers[0], Exception):
        raise answers[0]


def test_a_shared_folder_is_made_and_left_empty(tmp_path):
    everywhere(lambda rank, gather: check_folder(tmp_path / "runs" / "run", rank, HOSTS, gather))
    assert list((tmp_path / "runs" / "run").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match="--output .*file/run cannot be written .Not a directory"):
        everywhere(lambda rank, gather: check_folder(tmp_path / "file" / "run", rank, HOSTS, gather))


def test_what_all_ranks_find_and_what_none_finds_is_alike(tmp_path):
    (tmp_path / "tokenizer.json").write_text("one")
    paths = [tmp_path, tmp_path / "tokenizer.json", tmp_path / "missing"]
    everywhere(lambda rank, gather: check_same_files(paths, True, HOSTS, gather))


def test_files_that_can_be_read_pass(tmp_path):
    for rank in range(3):
        (tmp_path / f"{rank}.tar").write_bytes(b"x" * 2000)
    everywhere(lambda rank, gather: check_readable({tmp_path / f"{rank}.tar": 2000}, HOSTS, gather))


@pytest.mark.parametrize(("size", "reason"), [(None, "No such file or directory"), (10, "10 bytes in place of 2000")])
def test_a_file_that_no_rank_can_read_is_the_users_to_mend(tmp_path, size, reason):
    def check(rank: int, gather: Gather) -> None:
        check_readable(dict.fromkeys((tmp_path / f"{rank}{part}.tar" for part in "ab"), 2000), HOSTS, gather)

    for name in ("0a", "0b", "2a", "2b"):
        (tmp_path / f"{name}.tar").write_bytes(b"x" * 2000)
    if size is not None:
        for name in ("1a", "1b"):
            (tmp_path / f"{name}.tar").write_bytes(b"x" * size)
    with pytest.raises(
        PreflightError, match=rf"1a.tar cannot be read on rank 1 \(node2\) \({reason}\), and 1 more, nor"
    ):
        everywhere(check)
