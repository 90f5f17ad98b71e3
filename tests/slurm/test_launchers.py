"""The shipped sbatch files on a real SLURM: what users submit, what a signal, a death and an error do to it."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from captioned_tars import contents, small_rqvae, write_tars
from followed_runs import events, expect_same_run, last_step
from random_inception import write_inception
from tiny_training import write_tiny_training

from megarq.inference.pretrained import save_rqvae
from tests.end_to_end.conftest import COLOURS, RQTRANSFORMER, RQVAE, SHAPES, draw
from tests.slurm.conftest import SECONDS_FOR_A_JOB, Slurm

STEPS = 60
SITE = """
PARTITION=main
TIME=20
RANKS_PER_NODE={ranks}
GPU_OPTIONS=()
CPUS_PER_RANK=1
CPUS_WITHOUT_GPU=1
SETUP='export MEGARQ_SETUP=done'
LOGS={logs}
DATA={folder}
RUNS={folder}
MAX_DEATHS=2
END_SECONDS=5
"""


class Site:
    """A cluster with a site.env of its own."""

    def __init__(self, slurm: Slurm, folder: Path, ranks_per_node: int = 2) -> None:
        self.slurm, self.folder, self.logs = slurm, folder, folder / "logs"
        self.file = folder / "site.env"
        self.file.write_text(SITE.format(folder=folder, logs=self.logs, ranks=ranks_per_node))

    def call(self, script: str, *given: object) -> str:
        """What a script of launchers/slurm prints."""
        environment = (f"MEGARQ_SITE={self.file}", "SBATCH_EXPORT=NONE")  # which sites have whose logins set up much
        return self.slurm.call("env", *environment, f"launchers/slurm/{script}", *given).strip()

    def submit(self, job: str, *given: object) -> str:
        """The number of a job; sbatch's options, "--" and the arguments of its command are given."""
        return self.call("submit.sh", job, *given)

    def printed(self, job: str) -> str:
        return "".join(path.read_text() for path in sorted(self.logs.glob(f"*-{job}*.out")))

    def wait_until(self, condition: Callable[[], object], job: str) -> None:
        deadline = time.monotonic() + SECONDS_FOR_A_JOB
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for job {job}:\n{self.printed(job)}"
            time.sleep(0.05)

    def queued_again(self, job: str, times: int, start: float, fault: str, record: Callable[..., None]) -> None:
        """Wait until the job has asked so often, and note how long after `start` it was."""
        self.wait_until(lambda: self.printed(job).count("asks to be queued again") >= times, job)
        record("slurm", {"fault": fault, "ends": "asks to be queued again", "seconds": time.monotonic() - start})

    def ended(self, job: str) -> str:
        """The state that a job ends in, after however many restarts."""
        states = self.slurm.wait(job)
        (state,) = set(states.values())
        return state

    def restarts(self, job: str) -> int:
        return int(self.slurm.field(job, "Restarts"))


@pytest.fixture(scope="module")
def site(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(slurm, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def train(site: Site) -> list[str]:
    """Arguments of megarq/train.py, but for --output."""
    options = write_tiny_training(site.folder)
    changes = [f"train.steps={STEPS}", "checkpoint.every=10", "checkpoint.keep=0", "train.ema_decay=0.9"]
    return ["--ds_config", "zero1.json", *options, *changes]


@pytest.fixture(scope="module")
def undisturbed(site: Site, train: list[str]) -> Path:
    """A run of two nodes with two ranks each."""
    job = site.submit("train", "--nodes=2", "--", *train, "--output", site.folder / "undisturbed")
    assert site.ended(job) == "COMPLETED", site.printed(job)
    said = site.printed(job)
    assert "4 x cpu (launcher: srun): dp 4" in said and "attempt 1 on 127.0.0.[1-2]" in said
    return site.folder / "undisturbed"


def test_a_job_that_is_signalled_and_one_of_whose_ranks_is_killed_goes_on_to_its_end(site, train, undisturbed, record):
    run = site.folder / "disturbed"
    job = site.submit("train", "--nodes=2", "--", *train, "--output", run, "data.workers=1")
    site.wait_until(lambda: last_step(run) > 2, job)
    start = time.monotonic()
    site.slurm.call("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@120 has it before a time limit
    site.queued_again(job, 1, start, "USR1, as before a time limit", record)
    site.wait_until(lambda: last_step(run) > 12 and len(events(run, "started")) == 2, job)
    start = time.monotonic()
    os.kill(rank_of(run), signal.SIGKILL)
    site.queued_again(job, 2, start, "a rank is killed with -9", record)
    assert site.ended(job) == "COMPLETED" and site.restarts(job) == 2, site.printed(job)
    (stopped,) = events(run, "stopped")
    new, resumed, again = (event["step"] for event in events(run, "started"))
    assert new == 0 and resumed == stopped["step"] and again % 10 == 0 and resumed < again < STEPS
    first, second, third = site.printed(job).split(": attempt ")[1:]
    assert "stopped as asked" in first and "to be queued again" in first and "Traceback" not in first
    assert "a fault (status 137), the 1. in a row at step-000000" in second and "to be queued again" in second
    assert "done" in third
    expect_same_run(run, undisturbed)


def rank_of(run: Path) -> int:
    """The process of some rank of a run."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if os.fsencode(run) in words and words[0].endswith(b"python") and b"SLURM_PROCID=3" in environ_of(entry):
                return int(entry.name)
    raise AssertionError(f"no rank of {run} is running")


def environ_of(process: Path) -> list[bytes]:
    return (process / "environ").read_bytes().split(b"\0")


@pytest.mark.full
def test_a_job_whose_nodes_another_takes_saves_and_comes_back_after_it(site, train, undisturbed, record):
    run = site.folder / "preempted"
    job = site.submit("train", "--nodes=2", "--", *train, "--output", run, "checkpoint.every=1000")
    site.wait_until(lambda: last_step(run) > 2, job)
    start = time.monotonic()
    urgent = site.slurm.sbatch("squeue --noheader --format=%i:%T", "--partition=urgent", "--nodes=2", "--exclusive")
    assert f"{job}:" in urgent[""] and f"{job}:RUNNING" not in urgent[""]
    ends = "saved, and the other job done"
    record("slurm", {"fault": "preempted by another partition", "ends": ends, "seconds": time.monotonic() - start})
    assert site.ended(job) == "COMPLETED" and site.restarts(job) == 1, site.printed(job)
    (stopped,) = events(run, "stopped")
    assert [event["step"] for event in events(run, "started")] == [0, stopped["step"]]
    assert "stopped as asked" in site.printed(job)
    expect_same_run(run, undisturbed)


def test_torchrun_hands_the_signal_to_its_ranks(slurm, train, tmp_path):
    site, run = Site(slurm, tmp_path, ranks_per_node=1), tmp_path / "run"
    job = site.submit("train_torchrun", "--nodes=2", "--", "megarq/train.py", *train, "--output", run)
    site.wait_until(lambda: last_step(run) > 2, job)
    site.slurm.call("scancel", "--batch", "--signal=USR1", job)
    assert site.ended(job) == "COMPLETED" and site.restarts(job) == 1, site.printed(job)
    (stopped,) = events(run, "stopped")
    starts = [(event["launcher"], event["ranks"], event["step"]) for event in events(run, "started")]
    assert starts == [("torchrun or deepspeed", 2, step) for step in (0, stopped["step"])]
    assert last_step(run) == STEPS


def test_nodes_are_checked_before_a_long_run(site):
    run, data = site.folder / "checked", site.folder / "data-nobody-wrote"
    job = site.submit("preflight", "--nodes=2", "--", "--output", run, "--data", data)
    assert site.ended(job) == "FAILED" and f"--data {data}: not there on any rank" in site.printed(job)
    job = site.submit("preflight", "--nodes=2", "--", "--output", run, "--data", site.file)
    assert site.ended(job) == "COMPLETED", site.printed(job)
    assert "preflight: 4 ranks on 1 host" in site.printed(job) and "all_reduce" in site.printed(job)


def test_an_error_that_a_person_must_mend_is_not_tried_again(site, train):
    job = site.submit("train", "--nodes=2", "--", *train, "--output", site.folder / "refused", "train.lr=-1")
    assert site.ended(job) == "FAILED" and site.restarts(job) == 0
    said = site.printed(job)
    assert "train.lr=-1" in said and "ended with status 2: see the message above" in said


def test_a_job_that_dies_again_and_again_without_progress_is_given_up(site):
    script = site.folder / "dies.py"
    script.write_text("import os; print('setup', os.environ['MEGARQ_SETUP']); os._exit(7)")
    job = site.submit("evaluate", "--nodes=1", "--", script, "--output", site.folder / "nothing")
    assert site.ended(job) == "FAILED" and site.restarts(job) == 1, site.printed(job)
    said = site.printed(job)
    assert "a fault (status 7), the 2. in a row at nothing" in said and "giving up" in said and "setup done" in said


def test_a_job_that_is_cancelled_stays_away(site, train):
    run = site.folder / "cancelled"
    job = site.submit("train", "--nodes=1", "--", *train, "--output", run, "train.steps=100000")
    site.wait_until(lambda: last_step(run) > 3, job)
    site.slurm.call("scancel", job)
    assert site.ended(job) == "CANCELLED" and site.restarts(job) == 0
    assert "to be queued again" not in site.printed(job)


def test_tasks_of_an_array_that_are_signalled_come_back_each_by_itself(site):
    """The task of the highest index has the array's number for its own."""
    script, folder = site.folder / "twice.py", site.folder / "twice"
    script.write_text(TWICE)
    folder.mkdir()
    job = site.submit("evaluate", "--array=0-2", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--", script, folder)
    site.wait_until(lambda: len(list(folder.iterdir())) == 3, job)
    for task in (0, 2):
        site.slurm.call("scancel", "--batch", "--signal=USR1", f"{job}_{task}")
    site.wait_until(lambda: {path.name for path in folder.glob("*-again")} == {"0-again", "2-again"}, job)
    (folder / "go").touch()
    states = site.slurm.wait(job)
    assert set(states.values()) == {"COMPLETED"}, site.printed(job)
    assert sorted(path.name for path in folder.glob("*-again")) == ["0-again", "2-again"]


TWICE = """
import os, signal, sys, time
from pathlib import Path
folder, task = Path(sys.argv[1]), os.environ["SLURM_ARRAY_TASK_ID"]
signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
first = folder / task
(folder / f"{task}-again" if first.exists() else first).touch()
while not (folder / "go").exists():
    time.sleep(0.05)
"""


@pytest.mark.full
@pytest.mark.parametrize("dead", [("slurmstepd",), ("slurmstepd", "slurmd")], ids=["its step", "the node"])
def test_a_job_whose_node_dies_is_queued_again(site, dead, record):
    """srun alone would wait for that node without end."""
    script, folder = site.folder / "node_dies.py", site.folder / "-".join(dead)
    script.write_text(NODE_DIES)
    folder.mkdir()
    job = site.submit("evaluate", "--nodes=2", "--ntasks-per-node=1", "--", script, folder)
    site.wait_until(lambda: (folder / "1").exists(), job)
    task = int((folder / "1").read_text())
    step = parent_of(parent_of(task))
    assert b"slurmstepd" in Path(f"/proc/{step}/cmdline").read_bytes()
    victims = [step, parent_of(task), task]
    if "slurmd" in dead:
        victims.append(int((site.slurm.folder / "slurmd.127.0.0.2.pid").read_text()))
    start = time.monotonic()
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    fault = f"{' and '.join(dead)} of a node killed with its tasks, END_SECONDS=5"
    site.queued_again(job, 1, start, fault, record)
    if "slurmd" in dead:
        site.slurm.call("slurmd", "-N", "127.0.0.2")
    assert site.ended(job) == "COMPLETED" and site.restarts(job) == 1, site.printed(job)
    assert "a fault (status 1)" in site.printed(job)


NODE_DIES = """
import os, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), os.environ["SLURM_PROCID"]
if (folder / "0").exists() and (folder / "1").exists():
    sys.exit()
(folder / f"{rank}.new").write_text(str(os.getpid()))
(folder / f"{rank}.new").rename(folder / rank)
while not (folder / "1").exists() or Path("/proc", (folder / "1").read_text()).exists():
    time.sleep(0.05)
sys.exit(1)
"""


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.full
def test_a_time_limit_is_a_signal_and_the_job_comes_back(site, train):
    """SLURM looks at limits every half a minute, and signals half a minute early rather than late."""
    run = site.folder / "limited"
    limit = ("--time=2", "--signal=B:USR1@60")
    job = site.submit("train", "--nodes=1", *limit, "--", *train, "--output", run, "train.steps=100000")
    site.wait_until(lambda: len(events(run, "started")) >= 2, job)
    site.slurm.call("scancel", job)
    site.ended(job)
    assert events(run, "stopped") and "stopped as asked" in site.printed(job) and "TIME LIMIT" not in site.printed(job)


@pytest.mark.parametrize(("job", "option"), [("pretokenize", "--array=0-1"), ("pretokenize_mpi", "--nodes=2")])
def test_codes_are_made_by_an_array_and_by_mpi(site, job, option):
    folder = site.folder / job
    write_tars(folder / "shards", [6] * 6)
    save_rqvae(small_rqvae(0), folder / "rqvae")
    options = ("--rqvae", folder / "rqvae", "--data", folder / "shards", "--draws", 1)
    alone = site.submit(
        "pretokenize", "--ntasks=1", "--ntasks-per-node=1", "--", *options, "--output", folder / "alone"
    )
    number = site.submit(job, option, "--", *options, "--output", folder / "codes")
    assert site.ended(alone) == "COMPLETED", site.printed(alone)
    assert site.ended(number) == "COMPLETED", site.printed(number)
    assert contents(folder / "codes") == contents(folder / "alone")
    assert "36 samples in 6 shards" in site.printed(number)


def test_submit_says_what_it_needs(site):
    for given, said in [
        (("training",), "use one of evaluate export make_shards"),
        (("train", "--nodes=2"), "put -- between sbatch's options and the arguments"),
    ]:
        with pytest.raises(AssertionError, match=said):
            site.submit(*given)


WALK = """
MAKE_SHARDS=(--images "$DATA/pictures" --captions "$DATA/pictures.csv" --output "$DATA/shards" --samples-per-shard 16)
TRAIN_TOKENIZER=(--data "$DATA/shards/*.tar" --vocab-size 64 --output "$DATA/tokenizer.json")
TRAIN_RQVAE=(--ds_config zero1.json --model "$DATA/rqvae.yaml" --data "$DATA/shards/*.tar" --output "$RUNS/rqvae")
TRAIN_RQVAE_SBATCH=(--nodes=1 --ntasks=1 --ntasks-per-node=1)
PRETOKENIZE=(--rqvae "$RUNS/rqvae" --data "$DATA/shards/*.tar" --output "$DATA/codes" --transform none --draws 2)
PRETOKENIZE_SBATCH=(--array=0-1 --nodes=1 --ntasks=1 --ntasks-per-node=1)
VERIFY_CODES=("$DATA/codes" --model "$RUNS/rqvae")
TRAIN=(--ds_config zero3.json --model "$DATA/rqtransformer.yaml" --data "$DATA/codes"
    --tokenizer "$DATA/tokenizer.json" --output "$RUNS/t2i")
TRAIN_SBATCH=(--nodes=1)
EXPORT=("$RUNS/t2i" --output "$RUNS/model")
DRAW=(evaluation/coco.py --model "$RUNS/model" --items "$DATA/items.json" --output "$RUNS/drawn" --batch-size 12)
DRAW_SBATCH=(--nodes=1)
SCORE=(evaluation/score.py "$RUNS/drawn" "$DATA/pictures" --protocol torch-fidelity
    --feature-weights "$DATA/{weights}" --json "$RUNS/scores.json")
SCORE_SBATCH=(--nodes=1 --ntasks=1 --ntasks-per-node=1)
"""
STEPS_OF_THE_WALK = (
    *("make_shards", "train_tokenizer", "train_rqvae", "pretokenize", "verify_codes", "train", "export", "draw"),
    "score",
)


def test_the_whole_walk_is_submitted_at_once_and_ends_in_scores(slurm, tmp_path):
    site = Site(slurm, tmp_path)
    draw(tmp_path)
    for name, content in (("rqvae", RQVAE), ("rqtransformer", RQTRANSFORMER)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    captions = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    (tmp_path / "items.json").write_text(json.dumps(2 * captions))
    (tmp_path / "walk.env").write_text(WALK.replace("{weights}", write_inception(tmp_path).name))
    said = site.call("pipeline.sh", tmp_path / "walk.env")
    jobs = dict(line.split() for line in said.splitlines())
    assert tuple(jobs) == STEPS_OF_THE_WALK
    for name, job in jobs.items():
        assert site.ended(job) == "COMPLETED", f"{name}\n{site.printed(job)}"
    assert json.loads((tmp_path / "scores.json").read_text())["metrics"]["fid"]
    assert [event["ranks"] for event in events(tmp_path / "t2i", "started")] == [2]


def test_half_a_walk_is_not_left_in_the_queue(slurm, tmp_path):
    site = Site(slurm, tmp_path)
    (tmp_path / "walk.env").write_text(
        "TRAIN=(--help)\nTRAIN_SBATCH=(--begin=now+1hour)\nEXPORT=(x)\nEXPORT_SBATCH=(--no)\n"
    )
    with pytest.raises(AssertionError, match="cancelled what was submitted before: ([0-9]+)") as refused:
        site.call("pipeline.sh", tmp_path / "walk.env")
    assert site.ended(re.findall(r"submitted before: ([0-9]+)", str(refused.value))[0]) == "CANCELLED"


def test_behind_a_job_that_fails_nothing_of_the_walk_is_left_waiting(slurm, tmp_path):
    site = Site(slurm, tmp_path)
    (tmp_path / "walk.env").write_text('TRAIN=(--output "$RUNS/t2i")\nEXPORT=("$RUNS/t2i" --output "$RUNS/model")\n')
    said = site.call("pipeline.sh", tmp_path / "walk.env")
    train, export = (line.split()[1] for line in said.splitlines())
    assert site.ended(train) == "FAILED" and "--model, --data missing" in site.printed(train)
    assert site.ended(export) == "CANCELLED"
