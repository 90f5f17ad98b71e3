"""The workers that fill one folder together, whoever started them.

    python tools/pretokenize.py ...             a worker alone; a second one, started anywhere, shares the work
    mpirun -n 8 python tools/pretokenize.py     8 workers that end together: rank 0 completes the folder and reports
    srun python tools/pretokenize.py            a worker for each task; the last to end completes the folder
    sbatch --array=0-15 ...                     as many more

Locks on the shards (work.py) keep workers apart. A worker's number only says where it begins, so that wrong or equal
numbers cost nothing but a few refused locks.
"""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from megarq import cli
from megarq.errors import ConfigError
from megarq.launch.environment import LaunchEnvironment, read_environment, started_by_mpirun, worker_place

Item = TypeVar("Item")


class Crew:
    """This process's place among the workers, and under mpirun the way to the others."""

    def __init__(self, environment: LaunchEnvironment, first: int = 0, workers: int = 1, comm: Any = None) -> None:
        """first: number of the launcher's rank 0 among all `workers`; comm: mpi4py's, where ranks end together."""
        self.environment = environment
        self.number, self.workers = first + environment.rank, workers
        self.here = 1 if comm is None else _on_this_host(comm).size
        """Workers on this host, as far as is known."""
        self.ends = comm is None or comm.rank == 0
        """Whether the end is this worker's to tell."""
        self._comm = comm

    def gather(self, item: Item) -> list[Item] | None:
        """The items of all ranks that end together on rank 0, None on the others; waits for all of them."""
        if self._comm is None:
            return [item]
        arrived = self._comm.Ibarrier()
        while not arrived.Test():  # a blocking wait would keep a core busy that others decode on
            time.sleep(0.1)
        items: list[Item] | None = self._comm.gather(item)
        return items

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """An error in the body is told and ends all ranks, of which the others would wait for this one."""
        try:
            yield
        except BaseException as error:
            if self._comm is None:
                raise
            status = 1
            try:
                status = cli.run(_raising(error))
            except BaseException:
                traceback.print_exc()
            self._comm.Abort(status)


def find_crew(environ: Mapping[str, str]) -> Crew:
    """This process's place by its environment. Raises: ConfigError where that is incomplete or mpi4py is missing.

    mpi4py is imported under mpirun alone.
    """
    environment = read_environment(environ, meet=False)
    if started_by_mpirun(environ):
        comm = _world()
        # Not by variables: under mpirun inside a SLURM job, those of srun tell the place of mpirun's own helper.
        places = {"rank": comm.rank, "world_size": comm.size, "local_rank": _on_this_host(comm).rank}
        return Crew(replace(environment, **places), workers=comm.size, comm=comm)
    number, workers = worker_place(environ, environment)
    return Crew(environment, first=number - environment.rank, workers=workers)


def _world() -> Any:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(
            f"mpirun starts ranks that meet through mpi4py, which is missing ({error}). Use pip install mpi4py, or "
            "start the ranks with srun, or one by one: they share a folder all the same."
        ) from error
    return MPI.COMM_WORLD


def _on_this_host(comm: Any) -> Any:
    from mpi4py import MPI

    return comm.Split_type(MPI.COMM_TYPE_SHARED)


def _raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main
