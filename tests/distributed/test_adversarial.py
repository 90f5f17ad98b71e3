"""Stage 1 with a discriminator: ranks agree, several ranks are one, and a run that is resumed is the run it was."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from random_vgg import write_vgg
from tiny_runs import metrics_of
from tiny_stage1_runs import stage1_run, tiny_stage1

from megarq.checkpoint.run_folder import checkpoint_at
from megarq.engine.adversary import Adversary

TERMS = ("loss", "reconstruction_loss", "commitment_loss", *Adversary.terms)
STARTED_AT, SAVED_AT, KILLED_AT, STEPS = 2, 4, 5, 7
SMALL = 4e-5
"""Learning rate where other ranks round otherwise: Adam turns a rounding error in a tiny gradient into a whole step."""


def expect_equal_terms(ours, expected, tolerance, names=TERMS):
    """The losses of two runs agree, in the steps with a discriminator and in those before it."""
    assert [line["step"] for line in ours] == [line["step"] for line in expected]
    for mine, theirs in zip(ours, expected, strict=True):
        for name in names:
            step = f"{name} of step {theirs['step']}"
            if theirs[name] is None:
                assert mine[name] is None, step
            else:
                assert mine[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), step


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_are_bit_identical_after_50_steps_with_restarts(rank_group, run, ranks):
    first, *others = rank_group(ranks).run(stage1_run, run, tiny_stage1(50))
    assert (first["quantizer.codebooks.0.cluster_size_ema"] == 1).any(), "no code has restarted"
    assert int(first["quantizer.steps"]) == 50
    for other in others:
        for name, tensor in first.items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(("ranks", "stage", "perceptual"), [(2, 1, False), (2, 2, True), (4, 1, False), (4, 2, False)])
def test_ranks_have_the_losses_of_one_rank_with_their_batch(rank_group, tmp_path, ranks, stage, perceptual):
    config = tiny_stage1(STEPS, lr=SMALL, loss={"perceptual_weight": float(perceptual)})
    train = partial(stage1_run, vgg=write_vgg(tmp_path) if perceptual else None)
    rank_group(1).run(train, tmp_path / "alone", config)
    rank_group(ranks).run(train, tmp_path / "together", config, stage)
    alone = metrics_of(tmp_path / "alone")
    assert [line["generator_loss"] is None for line in alone] == [True] * STARTED_AT + [False] * (STEPS - STARTED_AT)
    # Rounding switches a ReLU of VGG16 now and then, and lambda, a quotient of gradients, moves by some 4e-4.
    tolerance, names = (1e-3, (*TERMS, "perceptual_loss")) if perceptual else (1e-5, TERMS)
    expect_equal_terms(metrics_of(tmp_path / "together"), alone, tolerance, names)


@pytest.mark.parametrize(("ranks", "precision"), [(1, "fp32"), (2, "fp32"), (2, "bf16")])
def test_a_resumed_run_is_bit_identical_on_the_same_ranks(rank_group, tmp_path, ranks, precision):
    config = tiny_stage1(STEPS, SAVED_AT, precision=precision, ema_decay=0.8)
    whole = rank_group(ranks).run(stage1_run, tmp_path / "whole", config)[0]
    rank_group(ranks).run(stage1_run, tmp_path / "killed", config, 1, KILLED_AT)
    assert checkpoint_at(tmp_path / "killed").metadata["step"] == SAVED_AT
    resumed = rank_group(ranks).run(stage1_run, tmp_path / "killed", config)[0]
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    ours, expected = checkpoint_at(tmp_path / "killed"), checkpoint_at(tmp_path / "whole")
    assert ours.metadata["discriminator_step"] == expected.metadata["discriminator_step"] == STEPS - STARTED_AT
    for kind in ("param", "exp_avg", "exp_avg_sq", "ema", "buffer"):
        assert ours.names(kind) == expected.names(kind) != []
        for name in ours.names(kind):
            assert torch.equal(ours.tensor(name, kind), expected.tensor(name, kind)), f"{kind} of {name}"


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2), (4, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(rank_group, tmp_path, first, second):
    config = tiny_stage1(STEPS, SAVED_AT, lr=SMALL)
    rank_group(second).run(stage1_run, tmp_path / "whole", config)
    rank_group(first).run(stage1_run, tmp_path / "moved", config, 1, KILLED_AT)
    rank_group(second).run(stage1_run, tmp_path / "moved", config)
    expect_equal_terms(metrics_of(tmp_path / "moved"), metrics_of(tmp_path / "whole"), 1e-5)


def test_a_discriminator_can_join_a_run_that_had_none(rank_group, run):
    config = tiny_stage1(STEPS, SAVED_AT, loss={"discriminator_warmup": 2})
    without = replace(config, loss=replace(config.loss, adversarial_weight=0.0))
    rank_group(2).run(stage1_run, run, without, 1, KILLED_AT)
    rank_group(2).run(stage1_run, run, config)
    lines = metrics_of(run)
    assert [line.get("generator_loss") is None for line in lines] == [True] * SAVED_AT + [False] * (STEPS - SAVED_AT)
    assert checkpoint_at(run).metadata["discriminator_step"] == STEPS - SAVED_AT
    for line, share in zip(lines[SAVED_AT:], (0.5, 1.0, 1.0), strict=True):
        pull = share * 0.75 * line["adaptive_weight"] * line["generator_loss"]
        assert line["loss"] == pytest.approx(line["reconstruction_loss"] + line["commitment_loss"] + pull, rel=1e-4)


def test_a_discriminator_can_leave_a_run(rank_group, run):
    config = tiny_stage1(STEPS, SAVED_AT)
    rank_group(2).run(stage1_run, run, config, 1, KILLED_AT)
    rank_group(2).run(stage1_run, run, replace(config, loss=replace(config.loss, adversarial_weight=0.0)))
    assert "discriminator_loss" not in metrics_of(run)[-1]
    assert not [name for name in checkpoint_at(run).names() if name.startswith("discriminator.")]


def test_accumulated_micro_batches_make_one_step_of_the_discriminator(rank_group, run):
    config = tiny_stage1(STEPS, micro_batch_size=2)
    rank_group(2).run(stage1_run, run, config)
    assert checkpoint_at(run).metadata["discriminator_step"] == STEPS - STARTED_AT
