"""The benchmarks of training, loading and pre-tokenization, on as little as they take."""

import json
import shlex

import pytest
from captioned_tars import small_rqvae, write_tars
from PIL import Image

from megarq.inference.pretrained import save_rqvae
from tests.end_to_end.commands import call, call_ranks, succeed

PARAMETERS = 1_070_336
SMALL = ("--model", "demo", "--steps", "2", "--warm-up", "1", "train.global_batch_size=8", "model.dropout=0")


def test_steps_are_timed_and_held_against_peak_and_plan(tmp_path):
    succeed("benchmarks/train_step.py", *SMALL, "log.peak_tflops=2", "--json", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["images_per_second"] == pytest.approx(8 / result["seconds_per_step"]["median"])
    assert result["mfu"] == pytest.approx(result["tflops_per_device"] / 2)
    assert result["planned_memory_gib"] > 16 * PARAMETERS / 2**30  # weights, gradients and moments in fp32, at least
    assert result["planned_host_memory_gib"] == 0
    assert result["layout"] == {"dp": 1, "tp": 1, "pp": 1, "zero": 1}


def test_what_is_offloaded_is_planned_for_the_hosts_memory(tmp_path):
    succeed("benchmarks/train_step.py", *SMALL, "--ds_config", "zero3-offload.json", "--json", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["planned_host_memory_gib"] > 16 * PARAMETERS / 2**30  # weights, gradients and moments, at least
    assert result["planned_memory_gib"] > 0


def test_a_layout_of_several_ranks_is_timed(tmp_path):
    cut = ("--ds_config", "pipeline.json", "parallel.pp=2", "train.micro_batch_size=4", "--json", tmp_path / "out.json")
    outcomes = call_ranks("benchmarks/train_step.py", *SMALL, *cut, ranks=2)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].errors
    assert json.loads((tmp_path / "out.json").read_text())["layout"] == {"dp": 1, "tp": 1, "pp": 2, "zero": 1}


def test_an_unlawful_layout_is_refused():
    outcome = call("benchmarks/train_step.py", *SMALL, "parallel.tp=2")
    assert outcome.status == 2 and "parallel.tp=2 x parallel.pp=1 = 2 does not divide the 1 ranks" in outcome.errors


def test_every_way_of_loading_is_timed(tmp_path):
    few = ("--samples", 64, "--latents", 16, "--members", 16, "--batch", 16, "--repeats", 1)
    succeed("benchmarks/loader.py", *few, "--folder", tmp_path, "--json", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    rates = result["samples_per_second"]
    assert {"classes", "classes, 2 workers", "webdataset, blocks", "captions, BPE dropout 0.1", "latents"} <= set(rates)
    assert all(rate > 0 for rate in rates.values()) and set(result["all_passes"]) == set(rates)
    ratio = rates["classes"] / rates["webdataset, one sample per member"]
    assert result["times_one_sample_per_member"] == pytest.approx(ratio, abs=0.051)


def test_one_rank_of_many_measures_its_loading(walk):
    half = ("--one-rank", walk / "codes", 1, 24, "--ranks", 2, "--batch", 8, "--steps", 6)
    result = json.loads(succeed("benchmarks/loader_scale.py", *half).printed)
    assert result["samples"] == 24 and result["bytes_read"] > 0
    assert 0 <= result["seconds_to_open"] <= result["seconds_to_first_batch"]
    assert 0 < result["peak_mib_before"] <= result["peak_mib_at_first_batch"] <= result["peak_mib_at_end"]


def test_pretokenization_is_held_against_its_parts(tmp_path):
    write_tars(tmp_path / "shards", [3, 3])
    save_rqvae(small_rqvae(0), tmp_path / "rqvae")
    few = ("--rqvae", tmp_path / "rqvae", "--data", tmp_path / "shards", "--batch-size", 2, "--repeats", 1)
    succeed("benchmarks/pretokenize.py", *few, "--device", "cpu", "--json", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    speed = result["images_per_second"]
    assert result["images"] == 6 and set(speed) == {"decode", "encode", "whole"}
    parts = 1 / speed["decode"] + 1 / speed["encode"]
    assert result["efficiency"] == pytest.approx(speed["whole"] * parts, abs=0.01)
    assert all(len(depths) == 3 and min(depths) >= 0 for depths in result["agreement_with_fp32"].values())


def test_photographs_are_trained_on_measured_and_drawn(tmp_path):
    few = ("--photographs", "coffee", "rocket", "--steps", 2, "--output", tmp_path / "run")
    small = ("model.resolution=32", "model.attention_resolutions=[1]", "model.codebook_size=16", "data.workers=0")
    out = ("--json", tmp_path / "out.json", "--pictures", tmp_path / "pictures.png")
    succeed("benchmarks/photographs.py", *few, *out, *small, "train.global_batch_size=2")
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["pictures"], result["step"]) == (2, 2)
    assert [point["step"] for point in result["training"]] == [1, 2]
    assert [row["depths"] for row in result["depths"]] == [1, 2, 3, 4]
    assert result["depths"][-1]["psnr"] == pytest.approx(result["metrics"]["psnr"]["value"])
    assert result["reached"] == {"PSNR above 25 dB": False}  # in two steps
    assert result["config"]["model"]["resolution"] == 32 and result["config"]["train"]["steps"] == 2
    with Image.open(tmp_path / "pictures.png") as sheet:
        assert sheet.height > 5 * 32


def test_what_a_checkpoint_and_a_restart_cost_is_measured_and_computed(walk, tmp_path):
    command = ["megarq/train.py", "--ds_config", "zero1.json", *walk.train, "train.steps=6", "train.ema_decay=0.5"]
    succeed(
        *("benchmarks/restart.py", "--gib", 0.25, "--repeats", 1, "--run", walk / "run", "--gpus", 16),
        *("--command", shlex.join(map(str, command)), "--json", tmp_path / "out.json"),
    )
    result = json.loads((tmp_path / "out.json").read_text())
    measured, run, model = result["measured_gb_per_second"], result["run"], result["computed"]
    assert set(measured) == {"copy", "write", "verify", "read"} and all(rate > 0 for rate in measured.values())
    assert run["steps"] == 4 and run["checkpoint_every"] == 2 and run["checkpoint_bytes"] > 12 * 1000
    assert 0 <= run["stall_share"] < 1 and run["restart_seconds"]["median"] > 0
    assert model["checkpoint_bytes"] == pytest.approx(12 * 3.9e9, rel=0.02) and model["nodes"] == 2
    assert model["stall_seconds"] == pytest.approx(model["checkpoint_bytes"] / 16 / 1e9 / measured["copy"])
    reading = model["checkpoint_bytes"] / 2 / 1e9 * (1 / measured["verify"] + 1 / measured["read"])
    assert model["of_which_reading_seconds"] == pytest.approx(reading)
