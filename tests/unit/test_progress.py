"""Progress in a log: nothing of short work, a line with the ETA now and then of long work."""

import sys

from megarq import progress


def test_short_work_leaves_nothing_in_a_log(capsys):
    assert list(progress.progress_bar(range(3))) == [0, 1, 2] and capsys.readouterr().err == ""


def test_long_work_leaves_lines_with_its_eta(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.001)
    with progress.progress_bar(total=4, desc="images") as bar:
        for _ in range(4):
            bar.start_t -= 1
            bar.last_print_t -= 1
            bar.update()
    printed = capsys.readouterr().err
    assert printed.count("images") >= 2 and "<00:" in printed


def test_a_terminal_has_its_bar_at_once(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.progress_bar(total=4, desc="images"):
        assert "images" in capsys.readouterr().err
