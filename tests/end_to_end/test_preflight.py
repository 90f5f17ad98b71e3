"""The preflight of a training command on two ranks: what it says, and how it ends a run that should not begin."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megarq import cli
from megarq.config import load
from megarq.engine import start
from megarq.engine.events import read_events
from megarq.errors import ConfigError
from megarq.launch import disks
from megarq.launch.watchdog import HUNG
from tests.end_to_end.commands import Outcome, call, call_ranks, start_ranks

OTHERS_FAULT, USERS_FAULT = 1, 2


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Folder of a run that is not there yet."""
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher ends the ranks here before they have spoken."""
    monkeypatch.setattr(cli, "SECONDS_FOR_RANK_ZERO", 0)


@pytest.fixture
def options(tiny_training: list[str], run: Path) -> list[object]:
    """Of megarq/train.py."""
    return ["--ds_config", "zero1.json", *tiny_training, "--output", run, "train.steps=2", "data.workers=0"]


def on_rank_one(patch: pytest.MonkeyPatch, place: object, name: str, change: Callable[..., Any]) -> None:
    """In place of a function, call `change` with it, and its arguments, on rank 1."""
    usual = getattr(place, name)

    def called(*given: Any, **named: Any) -> Any:
        return change(usual, *given, **named) if os.environ.get("RANK") == "1" else usual(*given, **named)

    patch.setattr(place, name, called)


def ended(outcomes: list[Outcome], status: int) -> str:
    """The one message of a job, which its first rank printed."""
    assert [outcome.status for outcome in outcomes] == [status] * 2, outcomes
    assert outcomes[0].errors.count("error: ") == 1 and "error" not in outcomes[1].errors
    return outcomes[0].errors.partition("error: ")[2]


def of_run(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["event"] == kind]


def test_every_start_of_a_run_is_preceded_by_its_checks(options, run):
    first = call_ranks("megarq/train.py", *options, ranks=2)[0]
    again = call("megarq/train.py", *options, "train.steps=3")
    assert first.status == again.status == 0, (first, again)
    assert first.printed.startswith("preflight: 2 ranks on 1 host, clocks within ") and "all_reduce" in first.printed
    assert again.printed.startswith("preflight: 1 rank on 1 host, space for ")
    two, one = of_run(run, "preflight")
    assert (two["step"], two["ranks"], one["step"], one["ranks"]) == (0, 2, 2, 1)
    assert two["files_read"] >= 2 and two["checkpoint_bytes"] == one["checkpoint_bytes"]
    assert not list(run.glob(".preflight*"))
    told = "WARNING: the warm-up takes 3 steps, the whole run 2: train.lr is never reached."
    assert told in first.printed and "warm-up" not in again.printed


def test_a_rank_with_another_configuration_ends_all_with_one_message(options, run, monkeypatch):
    def change(usual: Callable[..., Any], name: str, overrides: list[str], kind: str) -> Any:
        return usual(name, [*overrides, "train.lr=0.125"], kind)

    with monkeypatch.context() as patch:
        on_rank_one(patch, load, "load_config", change)
        text = ended(call_ranks("megarq/train.py", *options, ranks=2), USERS_FAULT)
    assert "the ranks are configured differently; rank 1 (" in text
    assert "train.lr is 0.125 there and 0.01 elsewhere" in text


def test_what_one_rank_lacks_is_a_fault_that_a_restart_may_mend(options, monkeypatch):
    def refuse(*given: Any) -> None:
        raise ConfigError("train.kernels=apex: not installed. Use torch.")

    with monkeypatch.context() as patch:
        on_rank_one(patch, start, "choose_kernels", refuse)
        text = ended(call_ranks("megarq/train.py", *options, ranks=2), OTHERS_FAULT)
    assert text.startswith("on rank 1 (") and "alone: train.kernels=apex: not installed." in text


def test_a_shard_that_one_rank_cannot_read_is_named(options, run, monkeypatch):
    with monkeypatch.context() as patch:
        on_rank_one(patch, disks, "_unreadable", lambda *given: "Input/output error")
        text = ended(call_ranks("megarq/train.py", *options, ranks=2), OTHERS_FAULT)
    assert "codes/0000" in text and ".tar cannot be read on rank 1 (" in text and "(Input/output error)" in text
    assert of_run(run, "failed")[0]["text"] == f"preflight: {text.strip()}"


def test_an_all_reduce_that_is_too_slow_ends_the_run_unless_nobody_asks(options, run):
    demand = "preflight.min_bandwidth_gbs=1000000"
    text = ended(call_ranks("megarq/train.py", *options, demand, ranks=2), OTHERS_FAULT)
    assert "preflight.min_bandwidth_gbs is 1e+06" in text
    assert not (run / "metrics.jsonl").exists()
    for outcome in call_ranks("megarq/train.py", *options, demand, "preflight.enabled=false", ranks=2):
        assert outcome.status == 0 and "preflight" not in outcome.printed, outcome
    assert of_run(run, "preflight") == [] and of_run(run, "finished")


def test_an_all_reduce_that_never_ends_is_ended_and_its_rank_named(options, run, tmp_path, monkeypatch):
    def wait(*given: Any, **named: Any) -> None:
        while True:
            time.sleep(0.01)

    with monkeypatch.context() as patch:
        on_rank_one(patch, dist, "all_reduce", wait)
        ranks = start_ranks("megarq/train.py", *options, "faults.hang_seconds=2", ranks=2, log=tmp_path / "log")
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [HUNG] * 2, (tmp_path / "log").read_text()
    (failed,) = of_run(run, "failed")
    assert failed["text"].startswith("HANG: rank 1 (") and "in step 0, preflight: all_reduce" in failed["text"]


def test_nodes_are_checked_without_a_run(tmp_path):
    first, second = call_ranks(
        "tools/preflight.py", "--output", tmp_path / "run", "--data", tmp_path, "--tp", 2, ranks=2
    )
    assert first.status == second.status == 0, (first, second)
    assert first.printed.startswith("preflight: 2 ranks on 1 host, clocks within ") and second.printed == ""
    assert "  all_reduce_gbs: " in first.printed and "  slowest_neighbour_host: " in first.printed
    assert list((tmp_path / "run").iterdir()) == []


def test_data_that_no_rank_has_are_refused_without_a_run(tmp_path):
    outcomes = call_ranks("tools/preflight.py", "--data", tmp_path / "nothere", ranks=2)
    assert [outcome.status for outcome in outcomes] == [2, 2]
    assert f"--data {tmp_path / 'nothere'}: not there on any rank" in outcomes[0].errors


def test_nodes_that_are_too_slow_are_refused_without_a_run(tmp_path):
    text = ended(call_ranks("tools/preflight.py", "--min-bandwidth", 1e6, ranks=2), OTHERS_FAULT)
    assert text.startswith("all_reduce of 1 MiB over 2 ranks has a bus bandwidth of")
