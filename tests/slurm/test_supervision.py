"""How a job is judged and queued again, by the shipped scripts and stand-ins for SLURM's commands: a controller that is
away, a disk that is full, a starter of tasks that does not return."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SQUEUE = """#!/bin/bash
echo x >>"$FOLDER/asked"
[[ $(wc -l <"$FOLDER/asked") -gt ${SILENT:-0} ]] && echo "${STATE:-RUNNING}"
"""
SCONTROL = """#!/bin/bash
echo x >>"$FOLDER/requeued"
[[ $(wc -l <"$FOLDER/requeued") -gt ${REFUSALS:-0} ]]
"""
JOB = """
set -euo pipefail
source launchers/slurm/common.sh
run() {{
{run}
}}
supervise run tools/nothing.py --output "$FOLDER/run"
"""


class Judged(NamedTuple):
    """What became of a job."""

    status: int
    said: str
    requeued: int


@pytest.fixture
def judge(tmp_path: Path) -> Callable[..., Judged]:
    """judge(bash lines of the tasks' starter, NAME=value ..): the batch script's end; `stdout` is where it prints."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in (("squeue", SQUEUE), ("scontrol", SCONTROL), ("sleep", "#!/bin/bash\nexec /bin/sleep 0.01\n")):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)

    def run(starter: str, stdout: str | None = None, site: str = "", **changes: object) -> Judged:
        (tmp_path / "site.env").write_text(f"LOGS={tmp_path}/logs\nMAX_DEATHS=2\n{site}\n")
        settings = {
            **{"MEGARQ_ROOT": ROOT, "MEGARQ_SITE": tmp_path / "site.env", "FOLDER": tmp_path},
            **{"SLURM_JOB_ID": 7, "SLURM_JOB_NAME": "train", "SLURM_JOB_NODELIST": "n1"},
            "PATH": f"{commands}:{os.environ['PATH']}",
        }
        done = subprocess.run(
            ["bash", "-c", JOB.format(run=starter)],
            env={**os.environ, **{name: str(value) for name, value in (settings | changes).items()}},
            stdout=subprocess.PIPE if stdout is None else Path(stdout).open("w"),  # noqa: SIM115
            stderr=subprocess.STDOUT if stdout is None else subprocess.DEVNULL,
            text=True,
            timeout=60,
        )
        asked = tmp_path / "requeued"
        requeued = len(asked.read_text().splitlines()) if asked.exists() else 0
        asked.unlink(missing_ok=True)
        (tmp_path / "asked").unlink(missing_ok=True)
        return Judged(done.returncode, done.stdout or "", requeued)

    return run


@pytest.mark.parametrize(
    ("status", "requeued", "said"),
    [
        (0, 0, "done"),
        (2, 0, "ended with status 2: see the message above"),
        (75, 1, "stopped as asked"),
        (143, 1, "a fault (status 143), the 1. in a row at nothing"),
        (76, 1, "a fault (status 76), the 1. in a row at nothing"),
    ],
)
def test_a_job_is_judged_by_its_status(judge, status, requeued, said):
    judged = judge(f"exit {status}")
    assert judged.requeued == requeued and said in judged.said
    assert judged.status == (0 if requeued else status)


def test_a_controller_that_is_away_is_asked_again(judge):
    judged = judge("exit 9", SILENT=4, REFUSALS=2)
    assert judged.status == 0 and judged.requeued == 3
    assert judged.said.count("SLURM does not tell the state of job 7") == 4


@pytest.mark.parametrize(("changes", "asked"), [({"STATE": "CANCELLED"}, 0), ({"REFUSALS": 100}, 5)])
def test_a_job_that_is_cancelled_or_refused_ends(judge, changes, asked):
    judged = judge("exit 75", **changes)
    assert judged.status == 1 and judged.requeued == asked


@pytest.mark.parametrize("status", [75, 9])
def test_a_full_disk_below_what_a_job_prints_does_not_end_it(judge, status):
    assert judge(f"exit {status}", stdout="/dev/full") == (0, "", 1)


def test_a_run_that_dies_before_its_first_checkpoint_makes_no_progress(judge, tmp_path):
    dies = 'mkdir -p "$FOLDER/run"; touch "$FOLDER/run/events.jsonl" "$FOLDER/run/$RANDOM$RANDOM"; exit 1'
    first, second = judge(dies), judge(dies)
    assert first.requeued == 1 and "the 1. in a row at no checkpoint" in first.said
    assert (second.status, second.requeued) == (1, 0) and "giving up: no progress in 2 attempts" in second.said


def test_another_jobs_progress_is_not_this_ones(judge, tmp_path):
    latest = tmp_path / "run" / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)
    for attempt, requeued in enumerate((1, 0)):
        latest.write_text(f"step-{attempt}\n")
        assert judge("exit 73").requeued == requeued


def test_a_starter_that_does_not_return_is_given_up_once_a_rank_has_failed(judge):
    judged = judge('echo 1 >"$MEGARQ_STATUS"; exec /bin/sleep 50', site="END_SECONDS=20")
    assert judged.status == 0 and judged.requeued == 1
    assert "not returned for 20 s after a rank ended with status 1: given up" in judged.said
    assert "a fault (status 1), the 1. in a row" in judged.said


def test_a_count_that_was_lost_begins_anew(judge, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "job-7.deaths").touch()
    assert "the 1. in a row" in judge("exit 1").said


def test_faults_are_counted_where_no_count_can_be_written(judge, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "job-7.deaths").symlink_to("/dev/full")
    assert [judge("exit 1", SLURM_RESTART_COUNT=count).requeued for count in (0, 1)] == [1, 0]


@pytest.mark.parametrize("number", ["USR1", "TERM"])
def test_a_job_that_is_asked_to_stop_while_it_is_set_up_comes_back(judge, number):
    judged = judge("exit 9", site=f"SETUP='kill -{number} $$'")
    assert (judged.status, judged.requeued) == (0, 1) and "stopped as asked" in judged.said


def test_a_job_that_is_run_once_fails_by_its_setup(judge):
    judged = judge("exit 0", site="ONCE=yes\nSETUP=false")
    assert (judged.status, judged.requeued) == (1, 0)


def test_a_setup_that_fails_is_a_fault_of_the_node(judge):
    attempts = [judge("exit 0", site="SETUP='true; cd /nowhere && true'") for _ in range(2)]
    assert [attempt.requeued for attempt in attempts] == [1, 0]
    assert "SETUP ended with status 1 on this node" in attempts[0].said and attempts[1].status == 1


def test_sites_may_read_variables_that_nobody_has_set(judge):
    judged = judge('echo "$FOUND"; exit 0', site="export FOUND=a$NEVER_SET\nSETUP='export FOUND=${FOUND}b$NOR_THIS'")
    assert judged.status == 0 and "\nab\n" in judged.said


def test_the_port_is_another_one_after_a_restart(judge):
    ports = [judge('meet; echo "port $MASTER_PORT"', SLURM_RESTART_COUNT=count).said.split()[-3] for count in (0, 1)]
    assert len(set(ports)) == 2


def test_a_task_notes_the_first_failure_alone(tmp_path):
    def status_of(*command: str) -> int:
        environment = {**os.environ, "MEGARQ_STATUS": str(tmp_path / "status")}
        return subprocess.run(["bash", "launchers/slurm/task.sh", *command], cwd=ROOT, env=environment).returncode

    assert status_of("true") == 0 and not (tmp_path / "status").exists()
    assert [status_of("bash", "-c", f"exit {status}") for status in (3, 4)] == [3, 4]
    assert (tmp_path / "status").read_text() == "3\n"
