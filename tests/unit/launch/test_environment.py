"""Which place a process has, by the variables of each launcher."""

import pytest

from megarq.errors import ConfigError
from megarq.launch.environment import LaunchEnvironment, read_environment, worker_place

MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MASTER}
SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", **MASTER}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1", **MASTER}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", **MASTER}
BATCH_SHELL = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "77"}


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        (TORCHRUN, "torchrun or deepspeed"),
        (SRUN, "srun"),
        (OPEN_MPI, "mpirun (Open MPI)"),
        (MPICH, "mpirun (MPICH)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_place_under_each_launcher(environ, launcher):
    assert read_environment(environ) == LaunchEnvironment(3, 8, 1, "node1", 1234, launcher)


def test_alone_without_any():
    assert read_environment({"HOME": "/root"}) == LaunchEnvironment(0, 1, 0, "127.0.0.1", 0, "none")


def test_the_batch_shell_of_an_allocation_is_alone():
    assert read_environment(BATCH_SHELL).world_size == 1


def test_torchrun_inside_a_slurm_step_counts():
    environ = {**BATCH_SHELL, "SLURM_STEP_ID": "0", **TORCHRUN}
    assert read_environment(environ).rank == 3


def test_mpirun_inside_an_allocation_counts():
    assert read_environment({**BATCH_SHELL, **OPEN_MPI}).launcher == "mpirun (Open MPI)"


def test_mpi_on_one_host_needs_no_address():
    environ = {key: value for key, value in MPICH.items() if key not in MASTER}
    assert read_environment(environ | {"MPI_LOCALNRANKS": "8"}).address == "127.0.0.1"


@pytest.mark.parametrize(
    ("variables", "local_size"), [(MPICH, "MPI_LOCALNRANKS"), (OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE")]
)
def test_mpi_on_several_hosts_needs_an_address(variables, local_size):
    environ = {key: value for key, value in variables.items() if key not in MASTER} | {local_size: "4"}
    with pytest.raises(ConfigError, match="started 8 ranks, but MASTER_ADDR is not set"):
        read_environment(environ)


@pytest.mark.parametrize(("environ", "launcher"), [(SRUN, "srun"), (TORCHRUN, "torchrun or deepspeed")])
def test_many_ranks_without_address_are_refused(environ, launcher):
    environ = {key: value for key, value in environ.items() if key != "MASTER_ADDR"}
    with pytest.raises(ConfigError, match=f"{launcher} started 8 ranks, but MASTER_ADDR is not set"):
        read_environment(environ)


def test_one_rank_without_address_is_fine():
    environ = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}
    assert read_environment(environ).world_size == 1


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["two", "", "-1", "1.5"])
def test_what_is_not_a_number_is_refused(variable, value):
    with pytest.raises(ConfigError, match=f"environment variable {variable}='{value}': expected a number"):
        read_environment({**TORCHRUN, variable: value})


def test_a_rank_outside_its_world_is_refused():
    with pytest.raises(ConfigError, match="RANK=3, but WORLD_SIZE=1"):
        read_environment({"RANK": "3"})


def test_the_tasks_of_a_job_array_are_workers_side_by_side():
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}
    for environ, place in (({}, (0, 1)), (array, (2, 4)), (SRUN, (3, 8)), (SRUN | array, (19, 32))):
        assert worker_place(environ, read_environment(environ)) == place
