"""Where a run stands, from its files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts import load_script

from megarq.engine.json_lines import EVENTS_FILE, METRICS_FILE
from megarq.engine.status import duration, page, status
from megarq.errors import ConfigError, DataError

START = 1_000_000.0


def event(kind: str, step: int, at: float, **values: Any) -> dict[str, Any]:
    return {"time": START + at, "event": kind, "step": step, **values}


def started(step: int = 0, seconds: float = 0, hosts: tuple[str, ...] = ("a", "b")) -> dict[str, Any]:
    return event("started", step, seconds, steps=1000, ranks=16, hosts=list(hosts), launcher="srun", job="77")


def line(step: int, seconds: float, **values: Any) -> dict[str, Any]:
    usual = {"step_seconds": 2.0, "data_seconds": 0.5, "checkpoint_stall_seconds": 0.0, "samples_seen": 64 * step}
    return {"step": step, "time": START + seconds, "loss": 10 - step / 100, "caption_loss": 1.0, **usual, **values}


@pytest.fixture
def run(tmp_path: Path):
    """`run(events, lines)`: a folder with these."""

    def write(events: list[dict[str, Any]], lines: list[dict[str, Any]]) -> Path:
        for name, written in ((EVENTS_FILE, events), (METRICS_FILE, lines)):
            (tmp_path / name).write_text("".join(json.dumps(each) + "\n" for each in written))
        return tmp_path

    return write


def test_a_run_that_goes_on(run):
    lines = [line(step, 10 + 2.5 * step) for step in range(1, 101)]
    found = status(run([started(), event("checkpoint", 100, 262, seconds=4.5)], lines), START + 270)
    assert (found.state, found.step, found.steps, found.ranks, found.job) == ("running", 100, 1000, 16, "77")
    assert found.losses == {"loss": 9.0, "caption_loss": 1.0}
    assert found.eta_seconds == pytest.approx(900 * 2.5) and found.images_per_second == pytest.approx(64 / 2.5)
    assert (found.data_share, found.stall_share, found.quiet_seconds) == (0.25, 0.0, 8)
    assert (found.checkpoint_step, found.checkpoint_age, found.checkpoint_seconds) == (100, 8, 4.5)
    text = page(found)
    assert "RUNNING, on 16 ranks of a, b, job 77; last sign of life 8s ago" in text
    assert "100, of 1,000, 10.0%, 37m30s left" in text and "step 100, 8s ago, written in 4.5 s" in text


def test_only_the_last_hour_counts_for_the_speed(run):
    slow = [line(step, 100 * step, step_seconds=100.0) for step in range(1, 51)]
    fast = [line(step, 5000 + 10 * (step - 50), step_seconds=10.0) for step in range(51, 501)]
    found = status(run([started()], slow + fast), START + 9501)
    assert found.images_per_second == pytest.approx(6.4) and found.step_seconds == 10.0
    assert found.loss_hour_ago == pytest.approx(10 - 140 / 100)


def test_nor_does_what_was_before_the_last_start(run):
    lines = [line(1, 10), line(2, 20), line(3, 1000), line(4, 1004)]
    found = status(run([started(), started(2, 990)], lines), START + 1005)
    assert found.images_per_second == pytest.approx(64 / 4) and (found.starts, found.deaths) == (2, 1)


def test_a_run_from_which_nothing_comes_is_silent(run):
    folder = run([started()], [line(1, 10), line(2, 20)])
    assert status(folder, START + 130).state == "running"
    found = status(folder, START + 150)
    assert found.state == "silent" and found.eta_seconds is None and "SILENT" in page(found)


def test_long_steps_are_no_silence(run):
    lines = [line(step, 100 * step, step_seconds=100.0) for step in (1, 2, 3)]
    assert status(run([started()], lines), START + 300 + 1900).state == "running"


@pytest.mark.parametrize("end", ["stopped", "failed", "finished"])
def test_how_a_run_ended(run, end):
    found = status(run([started(), event(end, 2, 30, text="a reason")], [line(1, 10), line(2, 20)]), START + 9999)
    assert found.state == end and (found.reason == "a reason") and "a reason" in page(found)


def test_deaths_are_starts_without_an_end_before(run):
    events = [
        started(),
        event("stopped", 5, 10),
        started(5, 20),
        started(5, 40),
        event("failed", 7, 50),
        started(7, 60),
    ]
    found = status(run(events, []), START + 61)
    assert (found.starts, found.deaths, found.step) == (4, 1, 7)
    assert "restarts   3, 1 after a death or fault" in page(found)


def test_ends_by_a_fault_count_as_deaths_and_those_that_a_person_mends_do_not(run):
    events = [
        started(),
        event("failed", 5, 10, text="Connection closed by peer", fault=True),
        started(4, 20),
        event("failed", 7, 50, text="a full disk", fault=False),
        started(7, 60),
    ]
    found = status(run(events, []), START + 61)
    assert (found.starts, found.deaths) == (3, 1)


def test_samples_that_were_lost_are_told(run):
    lines = [line(1, 10, lost_in_epoch=0), line(2, 20, lost_in_epoch=1682)]
    assert "lost       1,682 samples of this epoch" in page(status(run([started()], lines), START + 21))
    assert "stand in" not in page(status(run([started()], lines[:1]), START + 21))


def test_of_many_folders_those_that_are_no_run_are_named_beside_the_others(run, tmp_path):
    tool, folder = load_script("tools/status.py"), run([started()], [line(1, 10)])
    (tmp_path / "other").mkdir()
    found, missing = tool.look([tmp_path / "other", folder])
    assert [it.run for it in found] == [str(folder)] and missing[0].startswith(f"{tmp_path / 'other'} holds no events")
    with pytest.raises(DataError, match="it is no run"):
        tool.look([tmp_path / "other"])


@pytest.mark.parametrize("seconds", ["nan", "-1", "0"])
def test_watching_takes_seconds(seconds, tmp_path):
    with pytest.raises(ConfigError, match=r"--watch .*: give seconds, above 0"):
        load_script("tools/status.py").main([str(tmp_path), "--watch", seconds])


def test_what_was_skipped_taken_back_and_warned_of(run):
    warnings = [event("warning", step, step, text=f"rank {step} is slow") for step in range(1, 8)]
    events = [started(), *warnings, event("skipped", 8, 9, reason="loss is nan"), event("rolled back", 9, 10, to=5)]
    found = status(run(events, [line(9, 9)]), START + 11)
    assert (found.skipped, found.rolled_back, len(found.warnings)) == (1, 1, 5)
    assert "WARNING    step 7: rank 7 is slow" in page(found) and "rank 2 " not in page(found)


def test_a_run_that_has_just_started(run):
    found = status(run([started()], []), START + 5)
    assert (found.state, found.step, found.losses, found.checkpoint_step) == ("running", 0, {}, None)
    assert "none yet" in page(found)


def test_many_hosts_are_counted(run):
    assert "of a, b, c, 3 more" in page(status(run([started(hosts=tuple("abcdef"))], []), START))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="it is no run, or none that has begun. Give a run's --output"):
        status(tmp_path)


def test_no_torch_is_imported_for_it():
    code = "import sys, megarq.cli, megarq.engine.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.9, "59s"), (65, "1m05s"), (33120, "9h12m"), (273600, "3d04h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
