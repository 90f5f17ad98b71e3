"""What watchdogs conclude from the reports of all ranks. (That they end a hang: tests/end_to_end/test_faults.py.)"""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megarq.launch.watchdog import BEFORE, HANGS, HUNG, Report, Watchdog, judge, stands_in


def report(rank: int, marks: int = 10, collective: str | None = "all_reduce", step: int = 7) -> Report:
    return Report(rank, f"node{rank // 2}", step, marks, "forward and backward", 3.0, collective, "passes.py:44")


def test_a_rank_that_is_behind_is_named_with_its_host_and_what_the_others_wait_in():
    text = judge([report(0), report(1, 9, None), report(2), report(3)], 4)
    assert text == (
        "rank 1 (node0) in step 7, forward and backward (passes.py:44) is behind; "
        "the others wait in step 7, forward and backward, all_reduce (passes.py:44)."
    )


def test_with_equal_marks_it_is_the_one_that_stands_in_no_collective():
    assert judge([report(0), report(1), report(2, collective=None)], 3).startswith("rank 2 (node1) in step 7")


def test_ranks_without_a_report_are_named():
    assert judge([report(0), report(3)], 4).startswith("ranks 1, 2 gave no report in step 7: stopped, or dead")


def test_many_ranks_are_counted():
    text = judge([report(0), *(report(rank, 9) for rank in range(1, 9))], 9)
    assert text.count("node") == 5 and "and 3 more is behind" in text


def test_where_all_wait_in_a_collective_it_is_the_network():
    assert judge([report(0), report(1)], 2).endswith("look at the network between them.")


def test_a_stack_tells_our_innermost_line():
    collective, line = stands_in(sys._current_frames()[threading.get_ident()])
    assert collective is None and line == "?"  # nothing of ours is on it


def test_while_marks_come_nothing_happens(tmp_path: Path):
    with Watchdog(tmp_path, 0, 1, 0.3, lambda *said: pytest.fail(str(said))) as watchdog:
        for step in range(20):
            watchdog.mark(step, "work")
            time.sleep(0.05)
    assert not (tmp_path / HANGS).exists()


def test_time_for_which_the_whole_process_was_stopped_does_not_count(tmp_path: Path):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from megarq.launch.watchdog import Watchdog\n"
        "with Watchdog(Path(sys.argv[1]), 0, 1, 2.0, print) as watchdog:\n"
        "    watchdog.mark(4, 'work')\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(0.5)\n"
        "print('done')\n"
    )
    process = subprocess.Popen([sys.executable, "-uc", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=50)[0] == "done\n" and process.returncode == 0


def test_reports_of_the_last_hang_are_kept(tmp_path: Path):
    for hang in range(3):
        with Watchdog(tmp_path, 0, 1, 60, lambda *said: None):
            kept = list((tmp_path / BEFORE).glob("*"))
            assert [path.read_text() for path in kept] == ([f"hang {hang - 1}"] if hang else [])
            assert not (tmp_path / HANGS).exists()
        (tmp_path / HANGS).mkdir()
        (tmp_path / HANGS / "rank-00000.txt").write_text(f"hang {hang}")
    with Watchdog(tmp_path, 1, 2, 60, lambda *said: None):
        assert (tmp_path / HANGS).exists()  # they are rank 0's to move


def test_a_file_system_that_hangs_too_does_not_keep_the_process(tmp_path: Path):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from megarq.launch import watchdog as module\n"
        "module.GRACE = 0.1\n"
        "Path.mkdir = lambda self, *args, **options: time.sleep(60)\n"
        "with module.Watchdog(Path(sys.argv[1]), 0, 1, 0.2, print) as watchdog:\n"
        "    watchdog.mark(4, 'work')\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-uc", code, tmp_path], capture_output=True, text=True, timeout=50)
    assert done.returncode == HUNG and "rank 0: no progress for" in done.stderr


def test_a_process_alone_is_ended_with_its_report(tmp_path: Path):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from megarq.launch.watchdog import Watchdog\n"
        "with Watchdog(Path(sys.argv[1]), 0, 1, 0.2, lambda step, said: print(step, said)) as watchdog:\n"
        "    watchdog.mark(3, 'patient', times=4)\n"
        "    time.sleep(0.4)\n"
        "    watchdog.mark(4, 'work')\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-uc", code, tmp_path], capture_output=True, text=True, timeout=50)
    assert done.returncode == HUNG, done.stderr
    assert "rank 0: no progress for" in done.stderr and "step 4, work" in done.stderr
    assert done.stdout.startswith("4 HANG: ")
    assert "time.sleep" not in (tmp_path / HANGS / "rank-00000.json").read_text()
    assert 'File "<string>", line 8' in (tmp_path / HANGS / "rank-00000.txt").read_text()
