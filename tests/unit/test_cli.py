"""What all commands share: how they end."""

import errno
import signal
import subprocess
import sys

import pytest

from megarq import cli
from megarq.errors import DataError, RunHeldError, StorageError, TooLittleMemoryError


def test_ctrl_c_ends_a_command_with_one_line_and_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    assert cli.run(main) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_before_a_command_runs_is_no_traceback_either() -> None:
    """The shell sees a process that SIGINT ended: status 130."""
    code = "from megarq import cli; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "interrupted\n")


def test_other_errors_keep_their_traceback() -> None:
    code = "from megarq import cli; raise RuntimeError('a bug')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "a bug" in done.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TooLittleMemoryError("64 pictures do not fit"), 2),
        (StorageError("shard gone"), 1),
        (DataError("no such folder"), 2),
        (OSError(errno.EACCES, "not yours", "/disk"), 2),
        (OSError(errno.ESHUTDOWN, "evicted", "/lustre"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_one_rank_meets_alone_is_told_by_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def main() -> None:
        raise error

    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "3"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    assert cli.run(main) == status
    assert str(error.args[-1]) in capsys.readouterr().err


def test_what_all_ranks_meet_is_told_by_the_first(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "SECONDS_FOR_RANK_ZERO", 0)
    for rank, said in (("0", "error: held\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")

        def main() -> None:
            raise RunHeldError("held")

        assert cli.run(main) == cli.HELD
        assert capsys.readouterr().err == said
