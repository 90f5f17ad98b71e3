import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megarq.config.load import load_config
from megarq.errors import ConfigError
from megarq.planning.counts import transformer_parameters
from megarq.planning.dry_run import DryRun, RankKind, coverage_faults, dry_run
from megarq.planning.layout import Layout
from megarq.planning.sharding import Sharding

DEMO = load_config("demo").model
LARGE = {
    "ZeRO-3 over 512": Layout(tp=1, pp=1, dp=512, zero=3),
    "tp8 x dp64": Layout(tp=8, pp=1, dp=64, zero=1, sequence=True),
    "tp8 x pp4 x dp16": Layout(tp=8, pp=4, dp=16, zero=1),
    "4,096 ranks": Layout(tp=8, pp=1, dp=512, zero=2),
}
SMALL = {
    "ZeRO-1": Layout(tp=1, pp=1, dp=5, zero=1),
    "ZeRO-3": Layout(tp=1, pp=1, dp=5, zero=3),
    "tp2, ZeRO-2": Layout(tp=2, pp=1, dp=3, zero=2),
    "tp2 x pp2": Layout(tp=2, pp=2, dp=2, zero=1, ema=True),
}
MEASURED = """
import resource, sys, time
start = time.monotonic()
from megarq.config.load import load_config
from megarq.planning.dry_run import dry_run
from megarq.planning.layout import Layout
run = dry_run(load_config("t2i-3.9b").model, Layout(tp=8, pp=4, dp=16, zero=1))
run.render()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(len(run.faults), time.monotonic() - start, peak)
"""


@pytest.fixture(scope="module")
def demo() -> DryRun:
    """tp2 x pp2 x dp2 of the demo's model."""
    return dry_run(DEMO, SMALL["tp2 x pp2"])


@pytest.mark.parametrize("name", SMALL)
def test_every_number_has_one_owner(name: str) -> None:
    assert dry_run(DEMO, SMALL[name]).faults == ()


@pytest.mark.parametrize("layout", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("model", ["t2i-3.9b", "t2i-20b"])
def test_every_number_of_large_models_has_one_owner(model: str, layout: Layout) -> None:
    config = load_config(model).model
    run = dry_run(config, layout)
    assert run.faults == ()
    assert sum(parameter.numel for parameter in run.whole) == transformer_parameters(config).total


def test_512_ranks_of_the_3_9b_model_take_two_minutes_and_8_gib_at_most() -> None:
    printed = subprocess.run([sys.executable, "-W", "ignore", "-c", MEASURED], capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    faults, seconds, peak = map(float, printed.stdout.split())
    assert faults == 0
    assert seconds < 120
    assert peak < 8 * 2**30


def faults_after(run: DryRun, harm: Callable[[Sharding], Sharding]) -> list[str]:
    """What the check says once one stage's sharding has been harmed."""
    kind = run.kinds[1, 0]
    kinds = {**run.kinds, (1, 0): RankKind(kind.shard, harm(kind.sharding))}
    return list(coverage_faults(run.whole, kinds, run.layout.tp))


def gap_or_overlap(run: DryRun, row: int) -> str:
    """The fault of one parameter's ranges."""
    name = run.kinds[1, 0].shard.parameters[row].name
    return f"{name} on stage 1, tensor rank 0: the data-parallel ranks' ranges leave gaps or overlap"


def test_a_range_that_nobody_owns_is_found(demo: DryRun) -> None:
    def drop(sharding: Sharding) -> Sharding:
        length = sharding.length.clone()
        length[3] = 0
        return replace(sharding, length=length)

    assert faults_after(demo, drop) == [gap_or_overlap(demo, 3)]


def test_a_number_that_nobody_owns_is_found(demo: DryRun) -> None:
    def shorten(sharding: Sharding) -> Sharding:
        length = sharding.length.clone()
        length[3, length[3].argmax()] -= 1
        return replace(sharding, length=length)

    assert faults_after(demo, shorten) == [gap_or_overlap(demo, 3)]


@pytest.mark.parametrize("end", [0, 1], ids=["first number", "last number"])
def test_a_number_that_two_ranks_own_is_found(demo: DryRun, end: int) -> None:
    def overlap(sharding: Sharding) -> Sharding:
        start, length = sharding.start.clone(), sharding.length.clone()
        owner = int(length[3].argmax())
        length[3], start[3] = 0, 0
        length[3, owner], length[3, 1 - owner] = sharding.sizes[3], 1
        start[3, 1 - owner] = end * (sharding.sizes[3] - 1)
        return replace(sharding, start=start, length=length)

    assert gap_or_overlap(demo, 3) in faults_after(demo, overlap)


def test_ranges_that_do_not_fit_into_a_ranks_partitions_are_found(demo: DryRun) -> None:
    faults = faults_after(demo, lambda sharding: replace(sharding, flats=(sharding.flats[0],)))
    assert faults == ["stage 1, tensor rank 0: a data-parallel rank owns more numbers than its partitions hold"]


def test_a_parameter_that_a_tensor_rank_lacks_is_found(demo: DryRun) -> None:
    kind = demo.kinds[0, 1]
    shard = replace(kind.shard, parameters=kind.shard.parameters[1:])
    sharding = replace(
        kind.sharding,
        sizes=kind.sharding.sizes[1:],
        start=kind.sharding.start[1:],
        length=kind.sharding.length[1:],
    )
    faults = coverage_faults(demo.whole, {**demo.kinds, (0, 1): RankKind(shard, sharding)}, 2)
    name = kind.shard.parameters[0].name
    assert list(faults) == [f"{name} is on the stages [0], 1 times for 2 tensor ranks"]


def test_a_stage_that_is_there_twice_is_found(demo: DryRun) -> None:
    doubled = {**demo.kinds, (2, 0): demo.kinds[1, 0], (2, 1): demo.kinds[1, 1]}
    assert len(list(coverage_faults(demo.whole, doubled, 2))) == len(demo.kinds[1, 0].shard.parameters)


def test_slices_that_do_not_make_up_a_parameter_are_found(demo: DryRun) -> None:
    kinds = {
        place: RankKind(
            replace(kind.shard, parameters=tuple(replace(p, dim=None) for p in kind.shard.parameters)), kind.sharding
        )
        for place, kind in demo.kinds.items()
    }
    cut = [p for (_, rank), kind in demo.kinds.items() if rank == 0 for p in kind.shard.parameters if p.dim is not None]
    assert len(list(coverage_faults(demo.whole, kinds, 2))) == len(cut)


def test_a_checkpoint_holds_every_number_of_every_kind_once(demo: DryRun) -> None:
    numbers = sum(parameter.numel for parameter in demo.whole)
    assert sum(demo.file_bytes()) == 4 * 4 * numbers  # weights, two moments, moving average; fp32


def test_only_the_first_tensor_rank_writes_parameters_that_are_not_cut(demo: DryRun) -> None:
    uncut = {parameter.name for parameter in demo.kinds[0, 0].shard.parameters if parameter.dim is None}
    names = [{key.partition("/")[2] for key in demo.fragments(rank)} for rank in range(4)]
    assert uncut <= names[0] | names[2]
    assert not uncut & (names[1] | names[3])


def test_fragments_say_where_they_lie_in_the_whole_parameter(demo: DryRun) -> None:
    shapes = {parameter.name: parameter.shape for parameter in demo.whole}
    for rank in range(8):
        for key, (place, _) in demo.fragments(rank).items():
            assert place.shape == shapes[key.partition("/")[2]]


def test_facts_are_json(demo: DryRun) -> None:
    facts = json.loads(json.dumps(demo.facts()))
    assert facts["coverage"] == {"every_number_once": True, "faults": []}
    assert [stage["ranks"] for stage in facts["stages"]] == [4, 4]
    assert facts["checkpoint"]["files"] == len(facts["checkpoint"]["file_bytes"]) == 8


def test_the_page_says_whether_all_is_covered(demo: DryRun) -> None:
    assert "each has one owner" in demo.render()
    harmed = replace(demo, faults=("body.0.ln1.weight is nowhere",))
    assert "1 faults" in harmed.render() and "body.0.ln1.weight is nowhere" in harmed.render()


def test_no_process_group_is_left_behind(demo: DryRun) -> None:
    assert not dist.is_initialized()


def test_no_process_group_is_left_behind_by_a_failure() -> None:
    with pytest.raises(ConfigError):
        dry_run(replace(DEMO, codebook_sizes=[1]), Layout(1, 1, 2, 1))
    assert not dist.is_initialized()


def test_an_existing_process_group_is_refused() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ConfigError, match=r"a process group of 2 ranks exists already"):
            dry_run(DEMO, Layout(1, 1, 4, 1))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tp=3, pp=1, dp=1, zero=1), "is not divisible by parallel.tp=3"),
        (Layout(tp=1, pp=2, dp=1, zero=3), "DeepSpeed pipelines allow stages 0 and 1"),
        (Layout(tp=1, pp=99, dp=1, zero=1), "parallel.pp=99"),
        (Layout(tp=0, pp=1, dp=1, zero=1), "parallel.tp=0"),
        (Layout(tp=1, pp=1, dp=1, zero=4), "zero_optimization.stage=4"),
        (Layout(tp=1, pp=1, dp=2, zero=1, sequence=True), "parallel.sequence=true with parallel.tp=1"),
        (Layout(tp=1, pp=1, dp=2, zero=1, offload_parameters=True), "offload_param with stage 1"),
    ],
    ids=["heads", "pipeline", "layers", "degree", "stage", "sequence", "offload"],
)
def test_an_unlawful_layout_is_refused(layout: Layout, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dry_run(DEMO, layout)
