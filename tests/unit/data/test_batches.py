"""Workers and signals: what others send them is the rank's to answer, what the rank sends ends them."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from megarq.data.batches import batches_in_order
from megarq.data.sources import open_source
from megarq.launch.stop import SIGNALS


def process_of(number: int) -> tuple[int, int]:
    time.sleep(0.01)
    return number, os.getpid()


@pytest.fixture
def batches() -> Iterator[Iterator[tuple[int, int]]]:
    yield (batches := batches_in_order(process_of, workers=1))
    batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGINT])
def test_a_worker_outlives_what_a_scheduler_sends_to_all_processes(batches, number):
    _, worker = next(batches)
    sender = os.fork()
    if sender == 0:
        os.kill(worker, number)
        os._exit(0)
    os.waitpid(sender, 0)
    assert [next(batches) for _ in range(20)] == [(number, worker) for number in range(1, 21)]


def test_a_worker_ends_by_its_parents_signal(batches):
    _, worker = next(batches)
    os.kill(worker, signal.SIGTERM)
    with pytest.raises(RuntimeError, match=f"DataLoader worker .*{worker}.* exited unexpectedly"):
        while True:
            next(batches)


def test_the_processes_of_a_pipe_that_a_worker_reads_outlive_it_too():
    def read(number: int) -> int:
        with open_source(f"pipe:kill -TERM $$; kill -USR1 $$; echo {number}") as file:
            return int(file.read())

    assert list(batches_in_order(read, workers=1, stop=2)) == [0, 1]
