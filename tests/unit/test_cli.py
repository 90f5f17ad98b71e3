"""What all commands share: how they end."""

import signal
import subprocess
import sys

import pytest

from megarq import cli


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
