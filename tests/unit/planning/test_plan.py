import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

from megarq.config.load import load_config
from megarq.errors import ConfigError
from megarq.parallel.topology import ALONE
from megarq.planning.estimate import GIB, StageCosts, estimate
from megarq.planning.flops import training_flops
from megarq.planning.layout import Layout
from megarq.planning.layouts import lawful_layouts
from megarq.planning.plan import ATOM, TIE, facts, make_plan, render
from megarq.planning.sharding import model_shard, optimizer_sharding
from megarq.planning.state import state_bytes

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/plan.py as a module."""
    return load_script("tools/plan.py")


@pytest.fixture
def planned(run_config, machine):
    return make_plan(run_config, list(lawful_layouts(run_config, 4, 2)), machine)


@pytest.fixture
def estimated(run_config, machine):
    """`estimated(layout, **changes of the machine)`."""

    def one(layout, **changes):
        shards = [model_shard(run_config.model, layout, stage, ALONE) for stage in range(layout.pp)]
        states = [state_bytes(shard, optimizer_sharding(shard.parameters, layout), layout, 0) for shard in shards]
        stages = [StageCosts.of(run_config, shard) for shard in shards]
        return estimate(run_config, layout, replace(machine, **changes), stages, states)

    return one


def test_every_lawful_layout_is_in_the_plan_once(run_config, planned) -> None:
    def cut(layout):
        return replace(layout, micro_batch=1, accumulation=1)

    found = [cut(one.layout) for one in (*planned.estimates, *planned.unfit)]
    assert sorted(map(str, found)) == sorted(map(str, lawful_layouts(run_config, 4, 2)))


def test_the_recommended_layout_is_the_plainest_of_the_fastest(run_config, planned) -> None:
    least = planned.estimates[0].step
    fastest = [one.layout for one in planned.estimates if one.step <= max(TIE * least, least + ATOM)]
    plain = [replace(layout, micro_batch=1, accumulation=1) for layout in fastest]
    order = list(lawful_layouts(run_config, 4, 2))
    best = replace(planned.recommended.layout, micro_batch=1, accumulation=1)
    assert order.index(best) == min(map(order.index, plain))


def test_of_layouts_a_millisecond_apart_the_plainest_is_recommended(run_config, machine) -> None:
    layouts = list(lawful_layouts(run_config, 4, 2))
    plan = make_plan(run_config, layouts, replace(machine, peak=1e15))
    steps = [one.step for one in plan.estimates]
    assert TIE * steps[0] < plan.recommended.step < steps[0] + ATOM
    assert replace(plan.recommended.layout, micro_batch=1, accumulation=1) == layouts[0]


def test_what_does_not_fit_is_not_recommended(run_config, machine) -> None:
    layouts = list(lawful_layouts(run_config, 4, 2))
    needs = sorted(one.needed for one in make_plan(run_config, layouts, machine).estimates)
    plan = make_plan(run_config, layouts, replace(machine, memory=needs[0]))
    assert all(one.needed <= needs[0] for one in plan.estimates) and plan.unfit


def test_where_nothing_fits_the_closest_layout_is_named(run_config, machine) -> None:
    with pytest.raises(ConfigError, match=r"nothing fits into 2 GiB on 4 GPUs: .* tp=.*, needs .* Give more --gpus"):
        make_plan(run_config, list(lawful_layouts(run_config, 4, 2)), replace(machine, memory=2 * GIB))


def test_state_is_what_the_state_formulas_say(run_config, estimated) -> None:
    layout = Layout(1, 1, 4, 1, micro_batch=3)
    shard = model_shard(run_config.model, layout, 0, ALONE)
    state = state_bytes(shard, optimizer_sharding(shard.parameters, layout), layout, 0)
    memory = estimated(layout).memory
    assert memory["parameters"] + memory["gradients"] + memory["optimizer"] == state.total


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_what_is_offloaded_is_in_the_hosts_memory_alone(run_config, machine, estimated, zero) -> None:
    plain = Layout(1, 1, 4, zero, micro_batch=3)
    offloaded = replace(plain, offload_optimizer=True, offload_parameters=zero == 3)
    shard = model_shard(run_config.model, offloaded, 0, ALONE)
    state = state_bytes(shard, optimizer_sharding(shard.parameters, offloaded), offloaded, 0)
    one, other = estimated(plain), estimated(offloaded)
    assert (one.host, other.host) == (0, state.host)
    assert other.memory["optimizer"] == 0 < one.memory["optimizer"] < other.host
    rest = one.memory["activations"] + one.memory["buffers"] + machine.reserve
    assert other.needed == state.device + rest


def test_a_lone_rank_gathers_the_parameters_that_it_offloads(run_config, estimated) -> None:
    kept, offloaded = (estimated(Layout(1, 1, 1, 3, offload_parameters=each)).memory for each in (False, True))
    gathered = 2 * model_shard(run_config.model, Layout(1, 1, 1, 1), 0, ALONE).numel
    assert offloaded["buffers"] - kept["buffers"] == gathered


def test_the_page_shows_the_hosts_memory_where_it_is_used(run_config, machine) -> None:
    def page(**offloads) -> str:
        layout = Layout(1, 1, 4, 3, micro_batch=3, **offloads)
        return render(facts(make_plan(run_config, [layout], machine), "small", run_config, machine, 1e6, []))

    assert "in the host's memory" in page(offload_optimizer=True)
    assert "in the host's memory" not in page()


FP32_SUMS = 2 * 4
"""Bytes of a sum, read and written."""


@pytest.mark.parametrize(
    ("zero", "precision", "moved"),
    [
        (1, "bf16", 2 + FP32_SUMS),
        (1, "fp32", 4 + FP32_SUMS),
        (2, "bf16", 2 + 4 + (4 + FP32_SUMS) / 4),
        (3, "bf16", 2 + 4 + (4 + FP32_SUMS) / 4),
    ],
)
def test_each_micro_batch_more_adds_its_gradients_once_more(run_config, estimated, zero, precision, moved) -> None:
    """On a machine that computes so slowly that products hide all traffic and no weights are waited for."""
    layout = Layout(1, 1, 4, zero, precision=precision, micro_batch=3, accumulation=1)
    numbers = model_shard(run_config.model, layout, 0, ALONE).numel
    one, three = (estimated(replace(layout, micro_batch=3 // count, accumulation=count), peak=1e10) for count in (1, 3))
    assert three.step - one.step == pytest.approx(2 * moved * numbers / 1e12, rel=1e-3)


def test_gradients_of_a_lone_micro_batch_are_summed_in_bf16_alone(run_config, estimated) -> None:
    for precision, moved in (("bf16", 2 + FP32_SUMS), ("fp32", 0)):
        layout = Layout(1, 1, 1, 1, precision=precision, micro_batch=12)
        computing, products = (estimated(layout, memory_bandwidth=b).seconds["computing"] for b in (1e12, 1e30))
        numbers = model_shard(run_config.model, layout, 0, ALONE).numel
        assert computing - products == pytest.approx(moved * numbers / 1e12)


def test_one_gpu_computes_at_the_stated_efficiency(run_config, estimated) -> None:
    one = estimated(Layout(1, 1, 1, 1, micro_batch=12), memory_bandwidth=1e30)
    assert one.step == pytest.approx(12 * training_flops(run_config.model) / (0.5 * 1e12))
    assert one.images_per_second == pytest.approx(12 / one.step)


def test_recomputation_costs_the_blocks_once_more(run_config, estimated) -> None:
    without = estimated(Layout(1, 1, 1, 1, micro_batch=12), memory_bandwidth=1e30)
    again = estimated(Layout(1, 1, 1, 1, micro_batch=12, activation_checkpointing=True), memory_bandwidth=1e30)
    assert 1.2 < again.step / without.step < 4 / 3
    assert again.memory["activations"] < without.memory["activations"]


def test_few_tokens_wait_for_the_weights(estimated) -> None:
    small, large = (estimated(Layout(1, 1, 1, 1, micro_batch=size), peak=1e30) for size in (1, 12))
    assert small.seconds["computing"] == pytest.approx(large.seconds["computing"])


def test_a_pipeline_of_equal_stages_waits_for_its_bubble(estimated) -> None:
    layout = Layout(1, 2, 1, 1, micro_batch=1, accumulation=12)
    one = estimated(layout, memory_bandwidth=1e30)
    assert one.bubble == pytest.approx(1 / 13)
    busy = one.seconds["computing"] + one.seconds["communicating"]
    assert one.seconds["waiting for stages"] / busy == pytest.approx(1 / 12 + one.balance - 1, abs=0.05)


def test_reductions_of_zero_2_hide_behind_the_backward_pass(estimated) -> None:
    layout = Layout(1, 1, 4, 2, micro_batch=3)
    slow, fast = estimated(layout, peak=1e9), estimated(layout, peak=1e30)
    assert slow.seconds["communicating"] == 0 < fast.seconds["communicating"]


def test_zero_1_in_bf16_reduces_after_the_backward_pass(machine, estimated) -> None:
    one = estimated(Layout(1, 1, 4, 1, micro_batch=3), peak=1e9)
    assert one.seconds["reducing gradients"] == one.communication["gradients"] / machine.links.data(one.layout)


def test_facts_are_json_and_the_page_shows_the_recommended(run_config, machine, planned) -> None:
    numbers = json.loads(json.dumps(facts(planned, "small", run_config, machine, 1e6, [])))
    best = numbers["recommended"]
    assert sum(size for kind, size in best["memory"].items() if kind != "total") == best["memory"]["total"]
    assert best["gpu_hours"] == pytest.approx(1e6 / best["images_per_second"] * 4 / 3600)
    assert numbers["command"] in render(numbers)


def test_the_20b_configuration_has_20_billion_parameters() -> None:
    model = load_config("t2i-20b", architecture="rq-transformer").model
    assert 20e9 < model_shard(model, Layout(1, 1, 1, 1), 0, ALONE).numel < 21e9


def test_the_worked_example_is_what_its_command_prints(tool, capsys) -> None:
    page = (ROOT / "docs" / "planning.md").read_text()
    command, shown = re.search(r"```\n\$ python tools/plan\.py ([^\n]+)\n(.*?)\n```", page, re.S).groups()
    tool.main(shlex.split(command))
    assert capsys.readouterr().out.rstrip("\n") == shown


def test_the_tool_counts_the_passes_that_it_is_told(tool, capsys) -> None:
    options = ["--model", "demo", "--gpus", "1", "--images", "1000", "--epochs", "3", "--json"]
    tool.main(options)
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["images"] == 3000
    assert "train.epochs=3" in numbers["command"]


def test_the_tool_rehearses_the_recommended_layout(tool, capsys) -> None:
    tool.main(["--model", "demo", "--gpus", "4", "--layout", "tp=2", "--dry-run", "--json"])
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["dry_run"]["coverage"]["every_number_once"]
    assert numbers["dry_run"]["layout"]["tp"] == 2


@pytest.mark.parametrize(("options", "peak"), [([], 67), (["train.precision=bf16"], 989), (["--peak-tflops", "5"], 5)])
def test_the_peak_is_that_of_the_training_precision_unless_given(tool, capsys, options, peak) -> None:
    tool.main(["--model", "demo", "--gpus", "1", "--json", *options])
    assert json.loads(capsys.readouterr().out)["machine"]["peak"] == peak * 1e12


def test_a_tiny_model_is_not_cut(tool, capsys) -> None:
    tool.main(["--model", "demo", "--gpus", "4", "--json"])
    layout = json.loads(capsys.readouterr().out)["recommended"]["layout"]
    assert [layout[name] for name in ("tp", "pp", "dp", "zero")] == [1, 1, 4, 1]


@pytest.mark.parametrize("option", ["--gpus", "--gpu-memory", "--peak-tflops", "--node-link-gb-s"])
def test_the_tool_refuses_what_is_not_positive(tool, option) -> None:
    with pytest.raises(ConfigError, match=f"{option} 0: give a number above 0"):
        tool.main(["--model", "demo", "--gpus", "4", option, "0"])
