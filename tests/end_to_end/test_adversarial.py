"""Stage 1 with all of its losses by the command, and one short seed of the digits' adversarial configuration."""

import json
from pathlib import Path

import pytest
from random_vgg import write_vgg

from megarq.checkpoint.run_folder import checkpoint_at
from megarq.inference.pretrained import load_rqvae
from tests.end_to_end.commands import succeed

LOSSES = (
    *("reconstruction_loss", "perceptual_loss", "commitment_loss"),
    *("generator_loss", "adaptive_weight", "discriminator_loss", "logits_real", "logits_fake"),
    "discriminator_grad_norm",
)
STEPS, STARTED_AT = 4, 2


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(walk, tmp_path_factory):
    """A run with every loss."""
    vgg = write_vgg(tmp_path_factory.mktemp("vgg"))
    folder = tmp_path_factory.mktemp("every") / "run"
    data = ("--data", walk.shards, "--validation-data", walk / "shards" / "00002.tar", "--output", folder)
    losses = ("loss.perceptual_weight=1", "loss.adversarial_weight=0.75", f"loss.discriminator_start={STARTED_AT}")
    changes = (f"train.steps={STEPS}", "train.ema_decay=0.5", "log.console_every=1")
    options = ("--ds_config", "zero2.json", "--perceptual-weights", vgg, *losses, *changes)
    said = succeed("megarq/train_rqvae.py", "--model", walk / "rqvae.yaml", *data, *options).printed
    return folder, said


def test_every_loss_is_in_the_metrics(run):
    steps = [line for line in lines_of(run[0]) if "loss" in line]
    assert len(steps) == STEPS
    for number, line in enumerate(steps):
        missing = [name for name in LOSSES if line[name] is None]
        assert missing == ([] if number >= STARTED_AT else list(LOSSES[3:]))


def test_the_total_is_the_sum_of_the_weighted_terms(run):
    last = [line for line in lines_of(run[0]) if "loss" in line][-1]
    images = sum(last[name] for name in LOSSES[:3])
    assert last["loss"] == pytest.approx(images + 0.75 * last["adaptive_weight"] * last["generator_loss"], rel=1e-5)


def test_validation_has_the_losses_that_judge_a_model(run):
    found = next(line for line in lines_of(run[0]) if "validation_loss" in line)
    names = {"loss", *LOSSES[:3]}
    assert {name for name in found if name.startswith("validation_")} == {f"validation_{name}" for name in names}


def test_the_console_has_short_names_for_them(run):
    line = next(line for line in run[1].splitlines() if line.startswith(f"step {STEPS}/{STEPS} |"))
    assert all(f" {name} " in line for name in ("rec", "lpips", "commit", "gen", "lambda", "disc"))


def test_the_discriminator_is_in_the_checkpoint_and_not_in_the_model(run):
    saved = [name for name in checkpoint_at(run[0]).names() if name.startswith("discriminator.")]
    assert len(saved) == 10
    model = load_rqvae(run[0])
    assert not any("discriminator" in name for name in model.state_dict())


def test_a_short_seed_of_the_digits_is_stable_and_both_networks_learn(tmp_path):
    short = (
        "train.steps=40",
        "train.global_batch_size=8",
        "loss.discriminator_start=16",
        "loss.discriminator_warmup=8",
    )
    few = ("--seeds", 1, "--lengths", 1, "--kinds", "adversarial", "--output", tmp_path / "runs")
    out = ("--json", tmp_path / "out.json", "--pictures", tmp_path / "pictures.png")
    succeed("benchmarks/rqvae_gan.py", *few, *out, *short)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["reached"]["no divergence"] is True
    adversarial = found["runs"]["adversarial, 40 steps, seed 0"]
    assert adversarial["reconstruction_accuracy"] > 0.6  # 0.7 is measured; by chance 0.1
    assert min(adversarial["perplexity_over_k"]) > 0.4
    joined = lines_of(tmp_path / "runs" / "adversarial-x1-seed0")[16]
    assert adversarial["discriminator_loss"] < joined["discriminator_loss"] - 0.1
    assert adversarial["logits_real"] > adversarial["logits_fake"] + 0.2
    assert (tmp_path / "pictures.png").exists() and len(found["trainings"]) == 1
