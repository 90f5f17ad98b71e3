from collections.abc import Sequence

import pytest
import torch

from megarq.config.load import load_config
from megarq.parallel.topology import ALONE, TensorGroup
from megarq.planning.layout import Layout
from megarq.planning.sharding import SUB_GROUP, Sharding, ShardParameter, model_shard, optimizer_sharding
from megarq.transformer.rq_transformer import RQTransformer

DEMO = load_config("demo").model


def parameters(*sizes: int, decay: bool = True) -> list[ShardParameter]:
    """Parameters that all have weight decay, or none."""
    kind = "weight" if decay else "bias"
    return [ShardParameter(f"body.{index}.mlp.up.{kind}", (size,), None) for index, size in enumerate(sizes)]


def owners(sharding: Sharding, rank: int) -> dict[int, range]:
    """What a rank owns of each parameter, by its place in the list."""
    starts, lengths = sharding.start[:, rank].tolist(), sharding.length[:, rank].tolist()
    return {row: range(s, s + n) for row, (s, n) in enumerate(zip(starts, lengths, strict=True)) if n}


def one_by_one(sizes: Sequence[int], dp: int, rank: int) -> dict[int, range]:
    """ZeRO-1 and 2, counted number by number."""
    numbers = [(row, number) for row, size in enumerate(sizes) for number in range(size)]
    while len(numbers) % (2 * dp):
        numbers.append((-1, 0))
    part = len(numbers) // dp
    own = [place for place in numbers[rank * part : (rank + 1) * part] if place[0] >= 0]
    rows = sorted({row for row, _ in own})
    found = {row: [number for at, number in own if at == row] for row in rows}
    return {row: range(all_[0], all_[-1] + 1) for row, all_ in found.items()}


@pytest.mark.parametrize("zero", [1, 2])
def test_flat_parts_of_the_worked_example(zero: int) -> None:
    sharding = optimizer_sharding(parameters(7, 6), Layout(1, 1, 4, zero))
    expected = [{0: range(4)}, {0: range(4, 7), 1: range(1)}, {1: range(1, 5)}, {1: range(5, 6)}]
    assert [owners(sharding, rank) for rank in range(4)] == expected
    assert sharding.flats == (4,)


def test_zero_3_parts_of_the_worked_example() -> None:
    sharding = optimizer_sharding(parameters(7, 6), Layout(1, 1, 4, 3))
    expected = [{0: range(2), 1: range(2)}, {0: range(2, 4), 1: range(2, 4)}, {0: range(4, 6), 1: range(4, 6)}]
    assert [owners(sharding, rank) for rank in range(4)] == [*expected, {0: range(6, 7)}]
    assert sharding.flats == (4,)


@pytest.mark.parametrize("dp", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("sizes", [(1,), (16, 16), (5, 1, 1, 30, 2), (3, 100, 4)])
def test_flat_parts_are_those_counted_number_by_number(sizes: tuple[int, ...], dp: int) -> None:
    sharding = optimizer_sharding(parameters(*sizes), Layout(1, 1, dp, 1))
    assert [owners(sharding, rank) for rank in range(dp)] == [one_by_one(sizes, dp, rank) for rank in range(dp)]


def test_parameters_with_and_without_weight_decay_are_flattened_apart() -> None:
    both = [*parameters(6), *parameters(10, decay=False), *parameters(2)]
    sharding = optimizer_sharding(both, Layout(1, 1, 2, 1))
    assert sharding.flats == (4, 6)
    assert owners(sharding, 0) == {0: range(4), 1: range(6)}
    assert owners(sharding, 1) == {0: range(4, 6), 1: range(6, 10), 2: range(2)}


def test_zero_3_ends_a_flat_partition_when_it_is_full() -> None:
    sizes = (SUB_GROUP - 1, 1, 5, SUB_GROUP)
    assert optimizer_sharding(parameters(*sizes), Layout(1, 1, 1, 3)).flats == (SUB_GROUP, SUB_GROUP + 5)


def test_the_only_stage_is_the_whole_model() -> None:
    shard = model_shard(DEMO, Layout(1, 1, 1, 1), 0, ALONE)
    with torch.device("meta"):
        model = RQTransformer(DEMO)
    assert {p.name: p.shape for p in shard.parameters} == {n: tuple(p.shape) for n, p in model.named_parameters()}


def test_stages_share_the_layers_out_in_order() -> None:
    whole = model_shard(DEMO, Layout(1, 1, 1, 1), 0, ALONE)
    stages = [model_shard(DEMO, Layout(1, 2, 1, 1), stage, ALONE) for stage in range(2)]
    assert stages[0].layers + stages[1].layers == whole.layers


def test_a_tensor_rank_holds_slices_of_cut_parameters() -> None:
    shard = model_shard(DEMO, Layout(2, 1, 1, 1), 0, TensorGroup(None, 1, 2))
    named = {parameter.name: parameter for parameter in shard.parameters}
    up, width = named["body.0.mlp.up.weight"], DEMO.embed_dim
    assert (up.shape, up.dim) == ((2 * width, width), 0)
    assert named["body.0.ln1.weight"].dim is None


def test_frozen_codebooks_are_counted_at_four_bytes() -> None:
    shard = model_shard(DEMO, Layout(1, 1, 1, 1), 0, ALONE)
    codebook = 4 * DEMO.codebook_size * DEMO.codebook_dim
    offsets = 8 * DEMO.depth
    assert shard.buffer_bytes == 2 * (codebook + offsets)
