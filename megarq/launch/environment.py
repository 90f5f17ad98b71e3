"""Who am I: rank and world from whichever launcher started this process.

| launcher                  | rank                  | world                 | local rank                  |
|---------------------------|-----------------------|-----------------------|-----------------------------|
| torchrun, deepspeed       | RANK                  | WORLD_SIZE            | LOCAL_RANK                  |
| srun, one task per rank   | SLURM_PROCID          | SLURM_NTASKS          | SLURM_LOCALID               |
| Open MPI                  | OMPI_COMM_WORLD_RANK  | OMPI_COMM_WORLD_SIZE  | OMPI_COMM_WORLD_LOCAL_RANK  |
| MPICH and its children    | PMI_RANK              | PMI_SIZE              | MPI_LOCALRANKID             |
| none                      | 0                     | 1                     | 0                           |
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megarq.errors import ConfigError

_LAUNCHERS = {
    "torchrun or deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpirun (Open MPI)": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpirun (MPICH)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}

_LOCAL_SIZES = {"mpirun (Open MPI)": "OMPI_COMM_WORLD_LOCAL_SIZE", "mpirun (MPICH)": "MPI_LOCALNRANKS"}
"""Ranks on this host: where they are all of them, they meet on the loopback address unless told otherwise."""

_MPIRUN = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")
"""What Open MPI's and MPICH's mpirun set for their ranks, and nobody else does."""


@dataclass(frozen=True)
class LaunchEnvironment:
    """A process's place in its job."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    """Host of rank 0."""
    port: int
    """Port of rank 0 where processes meet."""
    launcher: str
    """Whose variables these are; "none" alone."""


def read_environment(environ: Mapping[str, str], meet: bool = True) -> LaunchEnvironment:
    """This process's place, from its environment variables. Raises ConfigError where they are incomplete.

    meet: whether the ranks are to find each other, which takes an address.
    """
    for launcher, names in _LAUNCHERS.items():
        # An allocation's batch shell has SLURM_NTASKS too; only a task that srun started has a step.
        if names[0] not in environ or (launcher == "srun" and "SLURM_STEP_ID" not in environ):
            continue
        places = zip(names, (0, 1, 0), strict=True)
        rank, world_size, local_rank = (_integer(environ, name, default) for name, default in places)
        if rank >= world_size:
            raise ConfigError(
                f"{names[0]}={rank}, but {names[1]}={world_size}: ranks count from 0. Start through the launcher, or "
                f"unset {names[0]}."
            )
        elsewhere = _integer(environ, _LOCAL_SIZES.get(launcher, ""), 0) < world_size
        if meet and world_size > 1 and "MASTER_ADDR" not in environ and elsewhere:
            raise ConfigError(
                f"{launcher} started {world_size} ranks, but MASTER_ADDR is not set: "
                "export MASTER_ADDR=<host of rank 0> and MASTER_PORT=<free port> before starting."
            )
        address = environ.get("MASTER_ADDR", "127.0.0.1")
        return LaunchEnvironment(
            rank, world_size, local_rank, address, _integer(environ, "MASTER_PORT", 29500), launcher
        )
    return LaunchEnvironment(0, 1, 0, "127.0.0.1", 0, "none")


def started_by_mpirun(environ: Mapping[str, str]) -> bool:
    """Whether Open MPI's or MPICH's mpirun started this process, perhaps where srun's variables are too."""
    return any(name in environ for name in _MPIRUN)


def worker_place(environ: Mapping[str, str], environment: LaunchEnvironment) -> tuple[int, int]:
    """(number, workers): this process among all that share a folder's work, the ranks of every task of a job array."""
    tasks, size = int(environ.get("SLURM_ARRAY_TASK_COUNT", 1)), environment.world_size
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP")
    task, least, step = (int(environ.get(name, default)) for name, default in zip(names, (0, 0, 1), strict=True))
    return (task - least) // step * size + environment.rank, tasks * size


def _integer(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name, str(default))
    if not value.isdigit():
        raise ConfigError(f"environment variable {name}={value!r}: expected a number from the launcher.")
    return int(value)
