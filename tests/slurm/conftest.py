"""A real SLURM cluster of two nodes on this host, on loopback, for the session; everything lies in one folder."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "sinfo")
NODES = ("127.0.0.1", "127.0.0.2")
SECONDS_TO_START, SECONDS_FOR_A_JOB = 60, 300
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
InactiveLimit=0
KillWait=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
MailProg=/bin/true
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2
"""


class Slurm:
    """A running cluster: `srun(...)` and `sbatch(...)` as a user types them, from the repository's root."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = _plain_environment() | {"SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *command: object) -> str:
        """Run a command; its stdout. Both streams are shown where it fails."""
        done = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=self.environment,
            text=True,
            capture_output=True,
            timeout=SECONDS_FOR_A_JOB,
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def srun(self, *arguments: object) -> str:
        """Run tasks and wait for them; what they printed."""
        return self.call("srun", *arguments)

    def sbatch(self, script: str, *options: object) -> dict[str, str]:
        """Submit a script, wait for the job or all tasks of the array; their output by task id ("" without array)."""
        file = self.folder / "job.sh"
        file.write_text(f"#!/bin/bash\n{script}\n")
        output = self.folder / "job-%A-%a.out"
        job = self.call("sbatch", "--parsable", f"--output={output}", f"--chdir={ROOT}", *options, file).strip()
        states = self.wait(job)
        printed = {task: self._output(job, task) for task in states}
        assert set(states.values()) == {"COMPLETED"}, f"{states}\n{printed}"
        return printed

    def wait(self, job: str) -> dict[str, str]:
        """The states in which a job, or all tasks of an array, have ended, by task id ("" without array)."""
        deadline = time.monotonic() + SECONDS_FOR_A_JOB
        while not set((states := self._field(job, "JobState")).values()) <= ENDED:
            assert time.monotonic() < deadline, f"job {job} did not end: {states}"
            time.sleep(0.1)
        return states

    def field(self, job: str, name: str) -> str:
        """What SLURM tells of a job without array."""
        return self._field(job, name)[""]

    def _field(self, job: str, name: str) -> dict[str, str]:
        """The same of each task of a job, by its id in the array."""
        lines = self.call("scontrol", "show", "job", "-o", job).splitlines()
        fields = [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in lines]
        return {field.get("ArrayTaskId", ""): field[name] for field in fields}

    def _output(self, job: str, task: str) -> str:
        found = list(self.folder.glob(f"job-{job}-{task or '*'}.out"))
        return found[0].read_text() if found else ""


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """The cluster. Skipped where SLURM is not installed, or not to be run by this user."""
    path = _plain_environment()["PATH"]
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install munge slurmctld slurmd slurm-client")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons are started as root here")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    _configure(cluster.folder)
    try:
        _start_munge(cluster.folder)
        cluster.call("slurmctld", "-c")
        for node in NODES:
            cluster.call("slurmd", "-N", node)
        idle = ("sinfo", "--noheader", "--states=idle", "--format=%D")
        _wait("two idle nodes", lambda: cluster.call(*idle).strip() == str(len(NODES)))
        yield cluster
    finally:
        _stop([*cluster.folder.glob("slurm*.pid"), cluster.folder / "munge" / "pid"])


def _configure(folder: Path) -> None:
    host = socket.gethostname().partition(".")[0]
    controller, *ports = _free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=8000 State=UNKNOWN"
        for node, port in zip(NODES, ports, strict=True)
    )
    values = {"folder": folder, "host": host, "port": controller, "user": "root", "nodes": nodes}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
    (folder / "state").mkdir()


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _start_munge(folder: Path) -> None:
    home = folder / "munge"
    home.mkdir(mode=0o755)
    key = home / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    # munged refuses a folder that others than its owner may write to, from the root down: /tmp needs --force.
    command = ["munged", "--force", *(f"--{option}={home / name}" for option, name in files.items())]
    subprocess.run(command, check=True, env=_plain_environment(), capture_output=True, timeout=SECONDS_TO_START)
    _wait("munge's socket", (home / "socket").exists)


def _wait(what: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while not ready():
        assert time.monotonic() < deadline, f"no {what} within {SECONDS_TO_START} s"
        time.sleep(0.05)


def _stop(pid_files: list[Path]) -> None:
    """End the daemons that wrote these files, all at once, and wait for them."""
    pids = [int(path.read_text()) for path in pid_files if path.exists()]
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)


def _plain_environment() -> dict[str, str]:
    """The environment of a user without GPUs, with this Python first."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI_", "OMPI_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
    return plain | {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
