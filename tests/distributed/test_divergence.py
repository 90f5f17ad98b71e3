"""A loss or gradient that is not finite ends both kinds of run on all ranks, and no checkpoint is written of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import ds_config, engine_run, tiny_config
from tiny_stage1_runs import stage1_run, tiny_stage1

from megarq.checkpoint.run_folder import checkpoint_at
from megarq.config.run import CheckpointConfig, ParallelConfig
from megarq.engine.loop import Trainer
from megarq.engine.passes import Terms
from megarq.engine.rqvae_run import RQVAETask
from megarq.engine.transformer_task import TransformerTask
from megarq.errors import DivergenceError

BAD_STEP = 4


def infinite_term(task: Any, name: str, terms: Terms, last_rank: bool) -> Terms:
    """A term, and with it the loss, is infinite on the last rank."""
    return {**terms, name: terms[name] * torch.inf, "loss": terms["loss"] * torch.inf} if last_rank else terms


def undefined_gradient(task: Any, name: str, terms: Terms, last_rank: bool) -> Terms:
    """All terms are what they were; the gradient of the last rank's loss is not a number."""
    return {**terms, "loss": terms["loss"] + (0 * terms["loss"]).sqrt()} if last_rank else terms


def undefined_discriminator(task: RQVAETask, name: str, terms: Terms, last_rank: bool) -> Terms:
    """All terms are what they were; the last rank's gradient of the discriminator is not a number."""
    if last_rank:
        next(task._adversary.discriminator.parameters()).grad.fill_(torch.nan)
    return terms


def stopped(
    spoil: Callable[..., Terms], name: str, task: type, method: str, train: Callable[..., Any], *args: Any
) -> str:
    """How a training ends whose terms are spoiled in one step."""
    step, whole, update = 0, getattr(task, method), Trainer._update

    def counted(self: Trainer, batch: Any) -> dict[str, float]:
        nonlocal step
        step = self.step + 1
        return update(self, batch)

    def spoiled(self: Any, *inputs: Any) -> Terms:
        terms = whole(self, *inputs)
        topology = self._groups.topology
        last_rank = topology.rank == topology.world_size - 1
        return spoil(self, name, terms, last_rank) if step == BAD_STEP else terms

    with pytest.MonkeyPatch.context() as patch, pytest.raises(DivergenceError) as caught:
        patch.setattr(Trainer, "_update", counted)
        patch.setattr(task, method, spoiled)
        train(*args)
    return str(caught.value)


def expect_stopped(messages: list[str], run: Path, named: str) -> None:
    """All ranks stopped with one message, and the newest checkpoint is that of the step before."""
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"step {BAD_STEP}: {named}") and "a lower train.lr" in messages[0]
    assert checkpoint_at(run).metadata["step"] == BAD_STEP - 1
    assert [path.name for path in sorted((run / "checkpoints").glob("step-*"))][-1] == f"step-{BAD_STEP - 1:08d}"


STAGE1 = {
    "reconstruction": (infinite_term, "reconstruction_loss", "loss is inf, reconstruction_loss is inf"),
    "commitment": (infinite_term, "commitment_loss", "loss is inf, commitment_loss is inf"),
    "discriminator": (infinite_term, "discriminator_loss", "loss is inf, discriminator_loss is inf"),
    "gradient": (undefined_gradient, "", "grad_norm is inf;"),
    "gradient of the discriminator": (undefined_discriminator, "", "discriminator_grad_norm is nan;"),
}


@pytest.mark.parametrize("case", STAGE1)
def test_stage_1(rank_group, run, case):
    spoil, name, named = STAGE1[case]
    config = tiny_stage1(BAD_STEP + 2, every=1)
    expect_stopped(rank_group(2).run(stopped, spoil, name, RQVAETask, "losses", stage1_run, run, config), run, named)


LAYOUTS = {
    "dp2 ZeRO-2": (ds_config(2), ParallelConfig(), "fp32"),
    "dp2 ZeRO-3": (ds_config(3), ParallelConfig(), "bf16"),
    "dp2 ZeRO-1, unchecked": (ds_config(1) | {"bf16": {"check_grad_overflow": False}}, ParallelConfig(), "bf16"),
    "pp2": (ds_config(1), ParallelConfig(pp=2), "fp32"),
}


@pytest.mark.parametrize("spoil", [infinite_term, undefined_gradient])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stage_2(rank_group, run, layout, spoil):
    ds, parallel, precision = LAYOUTS[layout]
    config = tiny_config(steps=BAD_STEP + 2, precision=precision)
    config.checkpoint, config.log.validate_every = CheckpointConfig(every=1, keep=0), 0
    case = stopped, spoil, "image_loss", TransformerTask, "_objective"
    messages = rank_group(2, layout).run(*case, engine_run, run, config, ds, parallel)
    expect_stopped(messages, run, "loss is inf, image_loss is inf" if spoil is infinite_term else "grad_norm is ")
