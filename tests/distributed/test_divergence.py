"""Losses and gradients that are not finite: a step is skipped, the run goes back without its samples, or it ends."""

import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import BATCH, SAMPLES_PER_EPOCH, ds_config, engine_run, metrics_of, tiny_config
from tiny_stage1_runs import stage1_run, tiny_stage1

from megarq.checkpoint.run_folder import checkpoint_at
from megarq.config.run import CheckpointConfig, ParallelConfig
from megarq.engine.events import read_events
from megarq.engine.loop import Trainer
from megarq.engine.passes import Terms
from megarq.engine.rqvae_run import RQVAETask
from megarq.engine.transformer_task import TransformerTask
from megarq.errors import DivergenceError

GOOD = 3
"""Batches before the bad ones, each saved."""
ALL_LATER = range(GOOD, 100)


def infinite_term(task: Any, name: str, terms: Terms, last_rank: bool) -> Terms:
    """A term, and with it the loss, is infinite on the last rank."""
    return {**terms, name: terms[name] * torch.inf, "loss": terms["loss"] * torch.inf} if last_rank else terms


def undefined_gradient(task: Any, name: str, terms: Terms, last_rank: bool) -> Terms:
    """All terms are what they were; the gradient of the last rank's loss is not a number."""
    return {**terms, "loss": terms["loss"] + (0 * terms["loss"]).sqrt()} if last_rank else terms


def high_loss(task: Any, name: str, terms: Terms, last_rank: bool) -> Terms:
    """The loss is a hundred times what it was, on all ranks."""
    return {**terms, "loss": terms["loss"] * 100}


def undefined_discriminator(task: RQVAETask, name: str, terms: Terms, last_rank: bool) -> Terms:
    """All terms are what they were; the last rank's gradient of the discriminator is not a number."""
    if last_rank:
        next(task._adversary.discriminator.parameters()).grad.fill_(torch.nan)
    return terms


def spoiled_run(
    bad: Collection[int],
    spoil: Callable[..., Terms],
    name: str,
    task: type,
    method: str,
    train: Callable[..., Any],
    *args: Any,
) -> Any:
    """What a training returns in which the batches of these numbers spoil the terms; or how it ends."""
    number, whole, update = 0, getattr(task, method), Trainer._update

    def counted(self: Trainer, batch: Any) -> dict[str, float]:
        nonlocal number
        number = batch.state.position(SAMPLES_PER_EPOCH) // BATCH - 1
        return update(self, batch)

    def spoiled(self: Any, *inputs: Any) -> Terms:
        terms = whole(self, *inputs)
        topology = self._groups.topology
        last_rank = topology.rank == topology.world_size - 1
        return spoil(self, name, terms, last_rank) if number in bad else terms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_update", counted)
        patch.setattr(task, method, spoiled)
        try:
            return train(*args)
        except DivergenceError as error:
            return str(error)


def without_batches(module: str, name: str, left_out: Collection[int], train: Callable[..., Any], *args: Any) -> Any:
    """What a training returns whose data never had the batches of these numbers."""
    whole = getattr(sys.modules[module], name)

    def skipping(*given: Any) -> Any:
        *config, number = given
        return whole(*config, number + (len(left_out) if number >= min(left_out) else 0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[module], name, skipping)
        return train(*args)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["event"] == kind]


def expect_ended(messages: list[str], run: Path, named: str) -> None:
    """Ranks went back twice without getting further, stopped with one message, and saved nothing of it."""
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"step {GOOD + 1}: {named}") and "a lower train.lr" in messages[0]
    assert "going back 2 times did not help" in messages[0]
    assert [path.name for path in sorted((run / "checkpoints").glob("step-*"))][-1] == f"step-{GOOD:08d}"
    assert checkpoint_at(run).metadata["step"] == GOOD
    assert [event["to"] for event in events(run, "rolled back")] == [GOOD, GOOD]
    assert events(run, "failed")[0]["text"] == messages[0]


STAGE1 = {
    "reconstruction": (infinite_term, "reconstruction_loss", "loss is inf, reconstruction_loss is inf"),
    "commitment": (infinite_term, "commitment_loss", "loss is inf, commitment_loss is inf"),
    "discriminator": (infinite_term, "discriminator_loss", "loss is inf, discriminator_loss is inf"),
    "gradient": (undefined_gradient, "", "grad_norm is inf;"),
    "gradient of the discriminator": (undefined_discriminator, "", "discriminator_grad_norm is nan;"),
}


@pytest.mark.parametrize("case", STAGE1)
def test_stage_1_ends_where_going_back_does_not_help(rank_group, run, case):
    spoil, name, named = STAGE1[case]
    config = tiny_stage1(GOOD + 3, every=1)
    config.faults.rollbacks = 2
    messages = rank_group(2).run(spoiled_run, ALL_LATER, spoil, name, RQVAETask, "losses", stage1_run, run, config)
    expect_ended(messages, run, named)


@pytest.mark.parametrize("case", STAGE1)
def test_stage_1_goes_back_at_once(rank_group, run, case):
    spoil, name, named = STAGE1[case]
    config, bad = tiny_stage1(GOOD + 3, every=GOOD), [GOOD + 1]
    group = rank_group(2)
    found = group.run(spoiled_run, bad, spoil, name, RQVAETask, "losses", stage1_run, run, config)[0]
    (back,) = events(run, "rolled back")
    assert (back["step"], back["to"]) == (GOOD + 2, GOOD) and named.rstrip(";") in back["reason"]
    # Batch GOOD was good, but came after the checkpoint: it is in the window that is not seen again.
    left_out = [GOOD, GOOD + 1]
    expected = group.run(
        without_batches, "tiny_stage1_runs", "global_images", left_out, stage1_run, run.with_name("plain"), config
    )[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


LAYOUTS = {
    "dp2 ZeRO-2": (ds_config(2), ParallelConfig(), "fp32"),
    "dp2 ZeRO-3": (ds_config(3), ParallelConfig(), "bf16"),
    "pp2": (ds_config(1), ParallelConfig(pp=2), "fp32"),
    "tp2": (ds_config(1), ParallelConfig(tp=2), "bf16"),
}
UNCHECKED = ds_config(2) | {"bf16": {"check_grad_overflow": False}}
"""The optimiser makes a step with whatever gradient there is."""


def stage_2(steps: int, precision: str, every: int = 1, **faults: Any) -> Any:
    config = tiny_config(steps=steps, precision=precision)
    config.checkpoint, config.log.validate_every = CheckpointConfig(every=every, keep=0), steps
    for name, value in faults.items():
        setattr(config.faults, name, value)
    return config


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = checkpoint_at(run, step)
    kinds = ("param", "exp_avg", "exp_avg_sq")
    return {f"{kind}/{name}": checkpoint.tensor(name, kind) for kind in kinds for name in checkpoint.names(kind)}


@pytest.mark.parametrize("spoil", [infinite_term, undefined_gradient])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stage_2_skips_the_step(rank_group, run, layout, spoil):
    ds, parallel, precision = LAYOUTS[layout]
    case = spoil, "image_loss", TransformerTask, "_objective", engine_run, run, stage_2(GOOD + 3, precision)
    rank_group(2, layout).run(spoiled_run, [GOOD], *case, ds, parallel)
    before, after, later = (saved(run, step) for step in (GOOD, GOOD + 1, GOOD + 2))
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(torch.equal(later[name], after[name]) for name in before if name.endswith("mlp.fc1.weight"))
    assert [event["step"] for event in events(run, "skipped")] == [GOOD + 1]
    steps = [line for line in metrics_of(run) if "lr" in line]
    assert (steps[GOOD]["loss"] is None) is (spoil is infinite_term and layout != "tp2")  # rank 1's is bad there
    assert steps[GOOD]["grad_norm"] is None and len(steps) == GOOD + 3
    counted = [checkpoint_at(run, step).metadata["optimizer_step"] for step in (GOOD, GOOD + 1, GOOD + 3)]
    assert counted == [GOOD, GOOD, GOOD + 2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stage_2_goes_back_without_the_samples(rank_group, run, layout):
    ds, parallel, precision = LAYOUTS[layout]
    config, bad = stage_2(GOOD + 3, precision, every=GOOD, skipped_steps=1), [GOOD + 1, GOOD + 2]
    group = rank_group(2, layout)
    case = infinite_term, "image_loss", TransformerTask, "_objective", engine_run, run, config
    found = group.run(spoiled_run, bad, *case, ds, parallel)[0]
    (back,) = events(run, "rolled back")
    assert (back["step"], back["to"]) == (GOOD + 3, GOOD)
    plain = engine_run, run.with_name("plain"), config, ds, parallel
    expected = group.run(without_batches, "tiny_runs", "global_batch", [GOOD, *bad], *plain)[0]
    assert expected and all(torch.equal(found[name], expected[name]) for name in expected)
    lines = [line["step"] for line in metrics_of(run) if "lr" in line]
    assert lines == [*range(1, GOOD + 4)]


def test_an_optimiser_that_does_not_look_is_taken_back_at_once(rank_group, run):
    config = stage_2(GOOD + 3, "bf16", every=GOOD)
    case = undefined_gradient, "", TransformerTask, "_objective", engine_run, run, config
    found = rank_group(2).run(spoiled_run, [GOOD], *case, UNCHECKED)[0]
    assert [event["to"] for event in events(run, "rolled back")] == [GOOD]
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("layout", ["dp2 ZeRO-3", "pp2"])
def test_stage_2_ends_where_going_back_does_not_help(rank_group, run, layout):
    ds, parallel, precision = LAYOUTS[layout]
    config = stage_2(GOOD + 3, precision, skipped_steps=0, rollbacks=2)
    case = infinite_term, "image_loss", TransformerTask, "_objective", engine_run, run, config
    messages = rank_group(2, layout).run(spoiled_run, ALL_LATER, *case, ds, parallel)
    expect_ended(messages, run, "loss is inf, image_loss is inf")


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(rank_group, run):
    config = stage_2(GOOD + 3, "fp32", every=100, skipped_steps=0)
    case = infinite_term, "image_loss", TransformerTask, "_objective", engine_run, run, config
    message = rank_group(2).run(spoiled_run, ALL_LATER, *case, ds_config(1))[0]
    assert "there is no checkpoint to go back to" in message


def test_a_loss_that_stays_high_takes_the_run_back(rank_group, run):
    steps, calm = 145, 130
    config = stage_2(steps, "fp32", every=calm, spike_factor=3.0, spike_steps=4)
    bad = range(calm + 3, calm + 7)

    case = high_loss, "", TransformerTask, "_objective", engine_run, run, config
    rank_group(2).run(spoiled_run, bad, *case, ds_config(1))
    (back,) = events(run, "rolled back")
    assert (back["step"], back["to"]) == (calm + 7, calm) and "4 steps above 3 times its median" in back["reason"]
    assert [line["step"] for line in metrics_of(run) if "lr" in line] == [*range(1, steps + 1)]


def test_saves_of_steps_that_are_skipped_are_no_progress(rank_group, run):
    """Every step is skipped, and every second one saved: going back to those saves must come to an end too."""
    config = stage_2(GOOD + 40, "fp32", every=2, skipped_steps=3, rollbacks=2)
    case = infinite_term, "image_loss", TransformerTask, "_objective", engine_run, run, config
    messages = rank_group(2).run(spoiled_run, ALL_LATER, *case, ds_config(1))
    assert "going back 2 times did not help" in messages[0] and len(events(run, "rolled back")) == 2
