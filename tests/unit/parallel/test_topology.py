"""Where ranks stand: pure arithmetic."""

import pytest

from megarq.errors import ConfigError
from megarq.parallel.topology import ALONE, ProcessGroups, Topology

LAYOUTS = [(1, 1, 1), (4, 2, 1), (8, 2, 2), (8, 4, 1), (12, 2, 3), (16, 4, 2)]


def place(topology: Topology) -> tuple[int, int, int]:
    return topology.tensor_rank, topology.data_rank, topology.pipeline_rank


def test_the_worked_example():
    ranks = [Topology(8, rank, tp=2, pp=2) for rank in range(8)]
    assert [rank.tensor_rank for rank in ranks] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [rank.data_rank for rank in ranks] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [rank.pipeline_rank for rank in ranks] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_lines_of_the_worked_example():
    topology = Topology(8, 0, tp=2, pp=2)
    assert topology.lines("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert topology.lines("data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert topology.lines("pipeline") == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize(("world", "tp", "pp"), LAYOUTS)
def test_no_two_ranks_stand_in_one_place(world, tp, pp):
    assert len({place(Topology(world, rank, tp, pp)) for rank in range(world)}) == world


@pytest.mark.parametrize(("world", "tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("axis", ["tensor", "data", "pipeline"])
def test_lines_hold_every_rank_once(world, tp, pp, axis):
    topology = Topology(world, 0, tp, pp)
    size = {"tensor": tp, "data": topology.dp, "pipeline": pp}[axis]
    lines = topology.lines(axis)
    assert sorted(rank for line in lines for rank in line) == list(range(world))
    assert {len(line) for line in lines} == {size}


def test_the_order_is_deepspeeds():
    pipe = pytest.importorskip("deepspeed.runtime.pipe.topology")
    theirs = pipe.PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=3)
    for rank in range(12):
        ours, coordinates = Topology(12, rank, tp=2, pp=2), theirs.get_coord(rank)
        assert place(ours) == (coordinates.model, coordinates.data, coordinates.pipe)


@pytest.mark.parametrize(("world", "tp", "pp"), [(4, 3, 1), (4, 2, 4), (1, 2, 1)])
def test_a_layout_that_the_world_does_not_hold_is_refused(world, tp, pp):
    with pytest.raises(ConfigError, match=f"parallel.tp={tp} x parallel.pp={pp} = {tp * pp} does not divide the"):
        Topology(world, 0, tp, pp)


@pytest.mark.parametrize(("tp", "pp"), [(0, 1), (1, -1)])
def test_sizes_below_one_are_refused(tp, pp):
    with pytest.raises(ConfigError, match="use 1 or more for each"):
        Topology(4, 0, tp, pp)


def test_no_groups_are_needed_alone():
    groups = ProcessGroups.build(Topology())
    assert groups.tensor is ALONE and groups.data is None
