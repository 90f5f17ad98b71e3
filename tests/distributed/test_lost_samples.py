"""Samples that some ranks cannot read: those that share a model go on alike, and all count, warn and end together."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megarq.data.loader import CodeBatch
from megarq.data.order import LoaderState
from megarq.engine.lost_samples import LostSamples, same_for_peers
from megarq.errors import LostDataError
from megarq.parallel.topology import ProcessGroups, Topology

CPU = torch.device("cpu")
PER_EPOCH = 100


def made_up(rank: int, lost: int, latents: bool = False) -> CodeBatch:
    """A batch that tells which rank's it is."""
    filled = torch.full((3, 2), rank)
    of_each = filled[:, 0]
    soft = filled.half() if latents else None
    news = [f"news of rank {rank}"] * bool(lost)
    return CodeBatch(filled, filled, soft, of_each.float(), of_each, of_each, LoaderState(1, rank), lost, news)


def shared(tp: int, pp: int, losers: list[int], latents: bool) -> tuple[int, list[str], set[float]]:
    """(state's sample, news, all values) of what a rank trains on where these ranks lost a sample."""
    rank = dist.get_rank()
    groups = ProcessGroups.build(Topology(dist.get_world_size(), rank, tp, pp))
    batch = same_for_peers(made_up(rank, int(rank in losers), latents), groups, CPU)
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == (6 if latents else 5)
    return batch.state.sample, batch.news, {float(number) for tensor in tensors for number in tensor.flatten()}


@pytest.mark.parametrize(
    ("tp", "pp", "losers", "taken"),
    [
        (2, 1, [], [0, 1, 2, 3]),
        (2, 1, [3], [0, 1, 2, 2]),
        (2, 1, [0], [0, 0, 2, 3]),
        (1, 2, [2], [0, 1, 0, 3]),
        (2, 2, [2], [0, 0, 0, 0]),
        (2, 2, [0, 3], [0, 0, 0, 0]),
        (1, 1, [1, 2], [0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize("latents", [False, True])
def test_ranks_that_share_a_model_take_the_first_one_s_batch_where_any_of_them_lost_a_sample(
    rank_group, tp, pp, losers, taken, latents
):
    found = rank_group(4).run(shared, tp, pp, losers, latents)
    assert [sample for sample, _, _ in found] == taken
    assert [values for _, _, values in found] == [{float(rank)} for rank in taken]
    assert [news for _, news, _ in found] == [[f"news of rank {rank}"] * (rank in losers) for rank in range(4)]


def counted(tp: int, losses: list[list[int]], epochs: list[int], rate: float) -> list[Any]:
    """Of each step the metric and the warnings, or the error; losses: of each step, by data-parallel rank."""
    topology = Topology(dist.get_world_size(), dist.get_rank(), tp, 1)
    count, steps = LostSamples(PER_EPOCH, rate, ProcessGroups.build(topology), CPU), []
    for by_rank, epoch in zip(losses, epochs, strict=True):
        count.add(made_up(topology.rank, by_rank[topology.data_rank]), training=True)
        count.add(made_up(topology.rank, 50), training=False)
        try:
            found = count.observe(epoch)
            steps.append((found.values["lost_samples"], found.values["lost_in_epoch"], found.warnings))
        except LostDataError as error:
            steps.append(str(error))
    return steps


@pytest.mark.parametrize("tp", [1, 2])
def test_losses_are_counted_once_and_told_by_all(rank_group, tp):
    dp, everyone = 4 // tp, [f"news of rank {rank}" for rank in range(4)]
    losses = [[0] * dp, [2] + [1] * (dp - 1), [0] * (dp - 1) + [3]]
    found = rank_group(4).run(counted, tp, losses, [0, 0, 0], 0.5)
    told = [f"{line}; other samples stand in for its own" for line in everyone]
    assert found == [[(0, 0, told), (dp + 1, dp + 1, told), (3, dp + 4, told)]] * 4


def test_too_many_losses_of_one_epoch_end_all_ranks(rank_group):
    losses, epochs = [[3, 2], [5, 0], [2, 3], [4, 1], [1, 0]], [0, 0, 1, 1, 1]
    found = rank_group(2).run(counted, 1, losses, epochs, 0.1)
    assert found[0] == found[1]
    assert [step[0] for step in found[0][:4]] == [5, 5, 5, 5]
    assert [step[1] for step in found[0][:4]] == [5, 10, 5, 10]
    error, *reasons = found[0][4].splitlines()
    assert error.startswith("11 samples of an epoch of 100 cannot be read, more than data.max_lost_rate=0.1 allows")
    assert reasons[:2] == ["  news of rank 0", "  news of rank 1"] and reasons[-1] == "  and 5 more"
