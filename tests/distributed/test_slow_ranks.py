"""A rank that is slow, or waits for its data, is told of by name; everybody's times are in the metrics."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_runs import Batches, ds_config, engine_run, metrics_of, tiny_config

from megarq.engine import ranks
from megarq.engine.events import read_events

STEPS = 13


def more_work(patch: pytest.MonkeyPatch) -> None:
    """The probe of rank 1 is fifty probes' work."""
    size, count = ranks._PROBE["cpu"]
    if dist.get_rank() == 1:
        patch.setitem(ranks._PROBE, "cpu", (size, 50 * count))


def late_batches(patch: pytest.MonkeyPatch) -> None:
    """Rank 1 waits for each batch for longer than its step takes otherwise."""
    whole = Batches.__iter__

    def late(self: Batches) -> Any:
        for batch in whole(self):
            if self.rank == 1:
                time.sleep(0.3)
            yield batch

    patch.setattr(Batches, "__iter__", late)


def slowed_run(slow: Callable[[pytest.MonkeyPatch], None], *args: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        slow(patch)
        engine_run(*args)


def warnings(run: Path, text: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["event"] == "warning" and text in event["text"]]


def config_of(probe_every: int) -> Any:
    config = tiny_config(steps=STEPS)
    config.faults.probe_every, config.faults.slow_factor, config.log.console_every = probe_every, 10.0, 1
    return config


def test_of_two_ranks_the_slower_one_is_named(rank_group, run):
    rank_group(2).run(slowed_run, more_work, run, config_of(2), ds_config(1))
    (warning,) = warnings(run, "is slow: a product of matrices takes it")
    assert warning["text"].startswith("rank 1 (")


def test_a_rank_whose_own_work_takes_longer_is_named_once(rank_group, run):
    rank_group(4).run(slowed_run, more_work, run, config_of(2), ds_config(1))
    (warning,) = warnings(run, "is slow: a product of matrices takes it")
    assert warning["text"].startswith("rank 1 (") and warning["step"] % 2 == 0
    told = [line for line in metrics_of(run) if "ranks_probe_seconds" in line][-1]
    assert len(told["ranks_step_seconds"]) == len(told["ranks_probe_seconds"]) == 4
    assert max(range(4), key=told["ranks_probe_seconds"].__getitem__) == told["slowest_rank"] == 1


def test_a_rank_that_waits_for_its_data_is_named_once(rank_group, run):
    rank_group(2).run(slowed_run, late_batches, run, config_of(0), ds_config(1))
    (warning,) = warnings(run, "waited for data in 0.3")
    assert warning["text"].startswith("rank 1 (") and "raise data.workers" in warning["text"]
    lines = [line for line in metrics_of(run) if "data_seconds" in line]
    assert all(line["data_seconds"] >= 0.3 and line["step_seconds"] > line["data_seconds"] for line in lines)
    assert all(line["ranks_data_seconds"][0] < 0.3 for line in lines)


def test_equal_ranks_are_not_told_of(rank_group, run):
    config = config_of(2)
    config.faults.slow_factor = 50.0  # the tests' own ranks share few cores
    rank_group(2).run(engine_run, run, config, ds_config(1))
    assert not warnings(run, "is slow")


def test_a_probe_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    assert ranks.probe(torch.device("cpu")) > 0
    assert torch.equal(torch.random.get_rng_state(), before)
