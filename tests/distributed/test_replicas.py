"""A flipped bit in what ranks must hold alike: it is named, never saved, and the run goes back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import ds_config, engine_run, tiny_config
from tiny_stage1_runs import stage1_run, tiny_stage1

from megarq.checkpoint.run_folder import checkpoint_at
from megarq.config.run import CheckpointConfig, ParallelConfig
from megarq.engine.events import read_events
from megarq.engine.loop import Trainer
from megarq.engine.replicas import checksum
from megarq.errors import FaultError

SAVED, FLIPPED = 2, 4
"""Steps: the first checkpoint, and the one before whose comparison a bit flips."""


def flip(tensor: torch.Tensor) -> None:
    """The lowest bit of the first number."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().view(-1).view(integers)
    bits[:1] ^= 1


def parameter(trainer: Trainer, name: str) -> torch.Tensor:
    return dict(trainer.state.module.named_parameters())[name].data


def buffer(trainer: Trainer, name: str) -> torch.Tensor:
    return dict(trainer.state.module.named_buffers())[name]


def master(trainer: Trainer, name: str) -> torch.Tensor:
    return next(item.master for item in trainer.state.fragments.items if item.name == name)


def beside(trainer: Trainer, name: str) -> torch.Tensor:
    return next(tensor for key, tensor in trainer.state.beside_tensors().items() if key.endswith(name))


def flipped_run(
    what: Callable[[Trainer, str], torch.Tensor], name: str, step: int, train: Callable[..., Any], *args: Any
) -> Any:
    """What a training returns in which a bit flips once, on the last rank."""
    look, done = Trainer._ranks_differ, []

    def flipping(self: Trainer, saving: bool) -> bool:
        topology = self.groups.topology
        if self.step == step and not done:
            done.append(step)
            if topology.rank == topology.world_size - 1:
                flip(what(self, name))
        return look(self, saving)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_ranks_differ", flipping)
        return train(*args)


def fault_of(*args: Any) -> str:
    """The message of a flipped run that ends by it."""
    with pytest.raises(FaultError) as caught:
        flipped_run(*args)
    return str(caught.value)


def named(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["event"] == kind]


NORM, CODEBOOK = "body.0.ln1.weight", "body_input.codes.vectors"
CASES = {
    "parameter": (ds_config(1), ParallelConfig(), parameter, NORM),
    "bf16 parameter": (ds_config(2), ParallelConfig(), parameter, NORM),
    "master weights": (ds_config(1), ParallelConfig(tp=2), master, NORM),
}


def stage_2(precision: str = "fp32", every: int = SAVED) -> Any:
    config = tiny_config(precision=precision)
    config.checkpoint = CheckpointConfig(every=every, keep=0)
    return config


@pytest.mark.parametrize("case", CASES)
def test_stage_2_names_what_differs_on_which_rank_and_goes_back(rank_group, run, case):
    ds, parallel, what, name = CASES[case]
    config = stage_2("bf16" if "bf16" in case else "fp32")
    layout = f"tp{parallel.tp}"
    rank_group(2, layout).run(flipped_run, what, name, FLIPPED, engine_run, run, config, ds, parallel)
    warnings = [event for event in named(run, "warning") if "numbers of" in event["text"]]
    assert [event["step"] for event in warnings] == [FLIPPED]
    assert warnings[0]["text"].startswith(f"ranks 0 and 1 hold different numbers of {name}")
    assert [(back["step"], back["to"]) for back in named(run, "rolled back")] == [(FLIPPED, SAVED)]
    assert [event["event"] for event in read_events(run)][-1] == "finished"


def test_what_no_checkpoint_holds_ends_the_run_as_a_fault(rank_group, run):
    """The frozen codebook is read from the RQ-VAE when a run starts."""
    messages = rank_group(2).run(fault_of, buffer, CODEBOOK, FLIPPED, engine_run, run, stage_2(), ds_config(3))
    assert len(set(messages)) == 1 and f"ranks 0 and 1 hold different numbers of {CODEBOOK}" in messages[0]
    assert f"still after going back to step {SAVED}. Start again" in messages[0]
    assert named(run, "failed")[0]["text"] == messages[0] and checkpoint_at(run).metadata["step"] == SAVED


def test_where_there_is_nothing_to_go_back_to_it_is_a_fault_all_the_same(rank_group, run):
    config = stage_2(every=100)
    config.faults.replicas_every = 1
    messages = rank_group(2).run(fault_of, parameter, NORM, FLIPPED, engine_run, run, config, ds_config(1))
    assert len(set(messages)) == 1 and f"hold different numbers of {NORM}" in messages[0]
    assert "there is no checkpoint to go back to" in messages[0]


def test_stage_1_compares_the_discriminator_too(rank_group, run):
    config = tiny_stage1(FLIPPED + 1, every=SAVED)
    rank_group(2).run(flipped_run, beside, "weight", FLIPPED, stage1_run, run, config)
    (warning,) = (event for event in named(run, "warning") if "numbers of" in event["text"])
    assert "discriminator" in warning["text"] and warning["step"] == FLIPPED
    assert [back["to"] for back in named(run, "rolled back")] == [SAVED]


def test_they_are_compared_between_checkpoints_where_asked(rank_group, run):
    config = stage_2()
    config.faults.replicas_every = 1
    rank_group(2).run(flipped_run, parameter, NORM, FLIPPED + 1, engine_run, run, config, ds_config(1))
    assert [(back["step"], back["to"]) for back in named(run, "rolled back")] == [(FLIPPED + 1, FLIPPED)]


def test_they_are_not_compared_where_that_is_off(rank_group, run):
    config = stage_2()
    config.faults.replicas_every = 0
    rank_group(2).run(flipped_run, parameter, NORM, FLIPPED, engine_run, run, config, ds_config(1))
    assert not named(run, "rolled back") and named(run, "finished")


def test_of_four_ranks_the_one_that_differs_is_named(rank_group, run):
    rank_group(4).run(flipped_run, parameter, NORM, FLIPPED, engine_run, run, stage_2(), ds_config(1))
    (warning,) = (event for event in named(run, "warning") if "numbers of" in event["text"])
    assert warning["text"].startswith(f"rank 3 holds other numbers of {NORM} than the data-parallel ranks beside it")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_any_bit_changes_the_checksum(dtype):
    tensor = torch.ones(5, 3).to(dtype)
    before = checksum(tensor)
    flip(tensor)
    assert before.dtype == torch.int64 and checksum(tensor) != before
