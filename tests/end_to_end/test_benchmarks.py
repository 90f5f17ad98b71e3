"""The training benchmark, on small configurations."""

import json

import pytest

from tests.end_to_end.commands import call, call_ranks, succeed

PARAMETERS = 1_070_336
SMALL = ("--model", "demo", "--steps", "2", "--warm-up", "1", "train.global_batch_size=8", "model.dropout=0")


def test_steps_are_timed_and_held_against_peak_and_plan(tmp_path):
    succeed("benchmarks/train_step.py", *SMALL, "log.peak_tflops=2", "--json", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["images_per_second"] == pytest.approx(8 / result["seconds_per_step"]["median"])
    assert result["mfu"] == pytest.approx(result["tflops_per_device"] / 2)
    assert result["planned_memory_gib"] > 16 * PARAMETERS / 2**30  # weights, gradients and moments in fp32, at least
    assert result["layout"] == {"dp": 1, "tp": 1, "pp": 1, "zero": 1}


def test_a_layout_of_several_ranks_is_timed(tmp_path):
    cut = ("--ds_config", "pipeline.json", "parallel.pp=2", "train.micro_batch_size=4", "--json", tmp_path / "out.json")
    outcomes = call_ranks("benchmarks/train_step.py", *SMALL, *cut, ranks=2)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].errors
    assert json.loads((tmp_path / "out.json").read_text())["layout"] == {"dp": 1, "tp": 1, "pp": 2, "zero": 1}


def test_an_unlawful_layout_is_refused():
    outcome = call("benchmarks/train_step.py", *SMALL, "parallel.tp=2")
    assert outcome.status == 2 and "parallel.tp=2 x parallel.pp=1 = 2 does not divide the 1 ranks" in outcome.errors
