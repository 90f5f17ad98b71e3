"""Training by its real commands: under DeepSpeed's launcher, killed and started again, and alone without a launcher."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_training import SAMPLES

from megarq.checkpoint.run_folder import checkpoint_at
from tests.end_to_end.commands import ON_CPU, ROOT, call, call_ranks, free_port, succeed, typed

STEPS, SAVED_EVERY, KILLED_AT = 24, 5, 13
KEYS = {
    *("step", "loss", "image_loss", "caption_loss", "grad_norm", "lr", "images_per_second", "mfu", "memory_gib"),
    *("samples_seen", "epoch", "step_seconds", "data_seconds", "checkpoint_stall_seconds", "restarts", "time"),
    *("lost_samples", "lost_in_epoch"),
}
BY_RANK = {f"ranks_{name}" for name in ("step_seconds", "data_seconds", "memory_gib", "probe_seconds")}
"""Of the steps that the console tells of, which are all of them here."""


@pytest.fixture(scope="module")
def options(tiny_training: list[str]) -> list[str]:
    """What a training command is given, but for --ds_config and --output."""
    return [*tiny_training, f"train.steps={STEPS}", f"checkpoint.every={SAVED_EVERY}"]


@pytest.fixture(scope="module")
def whole(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without launcher and without interruption."""
    run = tmp_path_factory.mktemp("whole") / "run"
    typed("megarq/train.py", "--ds_config", "zero1.json", *options, "--output", run, "data.workers=0")
    return run


@pytest.fixture(scope="module")
def killed(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks of DeepSpeed's launcher, killed in the middle, that goes on in one process without it."""
    run = tmp_path_factory.mktemp("killed") / "run"
    arguments = ["--ds_config", "zero3.json", *options, "--output", str(run)]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    with subprocess.Popen(
        [*launcher, "--master_port", str(free_port()), "megarq/train.py", *arguments],
        cwd=ROOT,
        env=os.environ | ON_CPU,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        seen = [line for line in iter(process.stdout.readline, "") if not kill_at(KILLED_AT, line, process)]
    assert process.returncode == -signal.SIGKILL, "".join(seen)
    succeed("megarq/train.py", *arguments)
    return run


def kill_at(step: int, line: str, process: subprocess.Popen) -> bool:
    """Kill all processes of a launch where a line of its console says that the step is done."""
    if line.startswith(f"step {step}/"):
        os.killpg(process.pid, signal.SIGKILL)
        return True
    return False


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_step_has_one_line_with_all_keys(whole):
    lines = metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(set(line) - {"checkpoint_seconds"} == KEYS | BY_RANK for line in lines)
    assert {line["restarts"] for line in lines} == {0} and {line["lost_samples"] for line in lines} == {0}
    assert 0 < len([line["checkpoint_seconds"] for line in lines if "checkpoint_seconds" in line]) < STEPS / SAVED_EVERY
    assert all(line[key] is not None for line in lines for key in KEYS | BY_RANK)


def test_epochs_and_samples_are_counted(whole):
    last = metrics(whole)[-1]
    assert (last["samples_seen"], last["epoch"]) == (STEPS * 16, STEPS * 16 // SAMPLES)


def test_the_run_learns(whole):
    losses = [line["loss"] for line in metrics(whole)]
    assert losses[-1] < losses[0]


def test_a_run_leaves_what_an_export_needs(whole):
    names = {path.name for path in whole.iterdir()}
    assert {"config.resolved.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "rqvae", "tokenizer.json"} <= names


def test_the_last_step_is_saved_and_the_newest_are_kept(whole):
    steps = sorted(path.name for path in (whole / "checkpoints").glob("step-*"))
    assert steps == ["step-00000020", "step-00000024"]
    assert checkpoint_at(whole).metadata["step"] == STEPS


def test_a_run_killed_on_two_ranks_has_each_step_once(killed):
    lines = metrics(killed)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(set(line) - {"checkpoint_seconds"} == KEYS | BY_RANK for line in lines)
    restarts = [line["restarts"] for line in lines]
    assert restarts == sorted(restarts) and set(restarts) == {0, 1}


def test_a_run_killed_on_two_ranks_has_the_losses_of_an_uninterrupted_one(whole, killed):
    for ours, expected in zip(metrics(killed), metrics(whole), strict=True):
        for name in ("loss", "image_loss", "caption_loss", "grad_norm", "lr", "samples_seen", "epoch"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-4), (ours["step"], name)


def test_a_pipeline_of_two_stages_has_the_losses_of_one_process_and_says_how_it_is_cut(whole, options, tmp_path):
    cut = ("parallel.pp=2", "train.micro_batch_size=4", "log.sample_every=12", "log.sample_count=4")
    arguments = ["--ds_config", "pipeline.json", *options, "--output", tmp_path / "run", "data.workers=0", *cut]
    first, second = call_ranks("megarq/train.py", *arguments, ranks=2)
    assert (first.status, second.status) == (0, 0), first.errors + second.errors
    assert "expected bubble 20.0% (1 of 5 slots)" in first.printed
    for ours, expected in zip(metrics(tmp_path / "run"), metrics(whole), strict=True):
        for name in ("loss", "image_loss", "caption_loss", "grad_norm", "lr"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-4), (ours["step"], name)


def test_a_finished_run_has_nothing_to_do(whole, options):
    before = (whole / "metrics.jsonl").read_text()
    said = succeed("megarq/train.py", "--ds_config", "zero1.json", *options, "--output", whole, "data.workers=0")
    assert f"already at step {STEPS}, nothing to do" in said.printed
    assert (whole / "metrics.jsonl").read_text() == before


def test_the_status_of_a_run_that_was_killed_and_went_on(killed):
    told = succeed("tools/status.py", killed).printed
    assert "FINISHED, on 1 ranks of " in told and f"{STEPS}, of {STEPS}, 100.0%" in told
    assert "restarts   1, 1 after a death" in told and f"step {STEPS}, " in told
    found = json.loads(succeed("tools/status.py", killed, "--json").printed)
    last = metrics(killed)[-1]
    assert (found["state"], found["losses"]["loss"], found["mfu"]) == ("finished", last["loss"], last["mfu"])
    assert found["images_per_second"] > 0 and 0 <= found["stall_share"] < 1 and 0 <= found["data_share"] < 1


def test_numbers_reach_deepspeeds_monitor_too(options, tmp_path):
    ds = {"zero_optimization": {"stage": 1}, "csv_monitor": {"enabled": True, "output_path": str(tmp_path)}}
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    run = tmp_path / "run"
    succeed("megarq/train.py", "--ds_config", tmp_path / "ds.json", *options, "--output", run, "train.steps=3")
    (losses,) = tmp_path.rglob("loss.csv")
    expected = ["step,loss", *(f"{line['step']},{line['loss']}" for line in metrics(run))]
    assert losses.read_text().splitlines() == expected
    assert not list(tmp_path.rglob("Train_*.csv"))  # DeepSpeed's own, which count samples


def test_ds_config_alone_is_answered_with_the_complete_command():
    outcome = call("megarq/train.py", "--ds_config", "zero3.json")
    assert outcome.status == 2
    assert "deepspeed megarq/train.py --ds_config zero3.json --model t2i-3.9b --data CODES" in outcome.errors
    assert "Traceback" not in outcome.errors
