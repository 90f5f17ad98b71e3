"""The plan of a run: every lawful layout estimated, the ones that fit in order of speed, and one recommended.

`make_plan` estimates each layout with the micro-batch that makes it fastest among those that fit; `facts` gives all
numbers for JSON, `render` a page.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megarq.config.run import RQTransformerRunConfig
from megarq.errors import ConfigError
from megarq.parallel.topology import TensorGroup
from megarq.planning.estimate import GIB, Estimate, Machine, StageCosts, estimate
from megarq.planning.flops import training_flops
from megarq.planning.layout import Layout
from megarq.planning.layouts import launch_command, micro_batches
from megarq.planning.sharding import Shard, model_shard, optimizer_sharding
from megarq.planning.state import StateBytes, state_bytes

TIE = 1.02
"""A layout within 2% of the fastest is as fast: the assumptions are not finer than that."""
ATOM = 1e-3
"""So is one within this many seconds of it: latency, which is left out, decides between steps as short as that."""
SHOWN = 10
"""Layouts in the table."""


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found."""

    estimates: list[Estimate]
    """Layouts that fit, the fastest first."""
    unfit: list[Estimate]
    """Those that do not, the smallest first."""
    recommended: Estimate
    """The plainest of the fastest."""


def make_plan(config: RQTransformerRunConfig, layouts: Sequence[Layout], machine: Machine) -> Plan:
    """Estimate all layouts, given from the plainest to the most intricate. Raises ConfigError where none fits."""
    shards: dict[tuple[int, int], list[Shard]] = {}
    stages: dict[tuple[int, int], list[StageCosts]] = {}
    fit: list[Estimate] = []
    unfit: list[Estimate] = []
    for layout in layouts:
        cut = layout.tp, layout.pp
        if cut not in shards:
            group = TensorGroup(size=layout.tp)
            shards[cut] = [model_shard(config.model, layout, stage, group) for stage in range(layout.pp)]
            stages[cut] = [StageCosts.of(config, shard) for shard in shards[cut]]
        found = _estimates(config, layout, machine, shards[cut], stages[cut])
        fitting = [one for one in found if one.needed <= machine.memory]
        if fitting:
            fit.append(min(reversed(fitting), key=lambda one: one.step))
        else:
            unfit.append(min(found, key=lambda one: one.needed))
    unfit.sort(key=lambda one: one.needed)
    if not fit:
        closest = unfit[0]
        raise ConfigError(
            f"nothing fits into {machine.memory / GIB:g} GiB on {machine.gpus} GPUs: the closest layout, "
            f"{describe_layout(closest.layout)}, needs {closest.needed / GIB:.1f} GiB. Give more --gpus or "
            "--gpu-memory, a smaller --reserve, or train with --ds_config zero3-offload.json."
        )
    fastest = min(one.step for one in fit)
    recommended = next(one for one in fit if one.step <= max(TIE * fastest, fastest + ATOM))
    return Plan(sorted(fit, key=lambda one: one.step), unfit, recommended)


def _estimates(
    config: RQTransformerRunConfig,
    layout: Layout,
    machine: Machine,
    shards: Sequence[Shard],
    stages: Sequence[StageCosts],
) -> list[Estimate]:
    """One for each micro-batch, smallest first."""
    states: dict[bool, list[StateBytes]] = {}
    found = []
    for sized in micro_batches(config, layout):
        accumulated = sized.accumulation > 1  # all of a micro-batch that the state depends on
        if accumulated not in states:
            states[accumulated] = [
                state_bytes(shard, optimizer_sharding(shard.parameters, sized), sized, data_rank=0) for shard in shards
            ]
        found.append(estimate(config, sized, machine, stages, states[accumulated]))
    return found


def describe_layout(layout: Layout) -> str:
    """`tp=8 pp=1 dp=8 zero=1 sequence recompute, micro-batch 16 x 16`."""
    words = [f"tp={layout.tp} pp={layout.pp} dp={layout.dp} zero={layout.zero}"]
    words += ["sequence"] * layout.sequence + ["recompute"] * layout.activation_checkpointing
    return f"{' '.join(words)}, micro-batch {layout.micro_batch} x {layout.accumulation}"


def facts(
    plan: Plan, model: str, config: RQTransformerRunConfig, machine: Machine, images: float, overrides: Sequence[str]
) -> dict[str, Any]:
    """All numbers, ready for JSON: bytes, seconds, and images per second of all GPUs; `images` are those of the run."""
    flops = training_flops(config.model)

    def numbers(one: Estimate) -> dict[str, Any]:
        speed = one.images_per_second
        return {
            "layout": asdict(one.layout),
            "memory": {**one.memory, "total": one.needed},
            "host_memory": one.host,
            "fullest_stage": one.stage,
            "sent_per_step": dict(one.communication),
            "seconds": {**one.seconds, "step": one.step},
            "bubble": one.bubble,
            "largest_stage_over_mean": one.balance,
            "images_per_second": speed,
            "mfu": flops * speed / (machine.gpus * machine.peak),
            "gpu_hours": images / speed * machine.gpus / 3600,
        }

    best = plan.recommended
    return {
        "model": model,
        "global_batch_size": config.train.global_batch_size,
        "precision": config.train.precision,
        "images": images,
        "training_flops_per_image": flops,
        "machine": asdict(machine),
        "recommended": numbers(best),
        "command": launch_command(model, config, best.layout, machine.links.gpus_per_node, overrides),
        "fit": [numbers(one) for one in plan.estimates],
        "unfit": [numbers(one) for one in plan.unfit],
    }


def render(facts: dict[str, Any]) -> str:
    """The page: assumptions, a table of the best layouts, and the recommended one in full."""
    machine, links = facts["machine"], facts["machine"]["links"]
    lines = [
        f"{facts['model']} on {machine['gpus']} GPUs ({links['gpus_per_node']} in a node), global batch "
        f"{facts['global_batch_size']}, {facts['precision']}, {facts['images']:,.0f} images",
        f"assumed: {machine['memory'] / GIB:g} GiB of memory, {machine['reserve'] / GIB:g} of them kept free; peak "
        f"{machine['peak'] / 1e12:g} TFLOP/s, of which products reach {machine['efficiency']:.0%};",
        f"  memory {machine['memory_bandwidth'] / 1e9:g} GB/s; links {links['inside'] / 1e9:g} GB/s inside a node, "
        f"{links['between'] / 1e9:g} GB/s for each GPU between nodes",
        "",
        f"{len(facts['fit'])} layouts fit, {len(facts['unfit'])} do not; the fastest:",
        f"  {'layout':<48} {'micro':>9} {'memory':>9} {'bubble':>6} {'step':>8} {'images/s':>8} {'mfu':>5}",
    ]
    for one in facts["fit"][:SHOWN]:
        words, _, sizes = describe_layout(Layout(**one["layout"])).partition(", micro-batch ")
        mark = "*" if one == facts["recommended"] else " "
        lines.append(
            f"{mark} {words:<48} {sizes:>9} {_gib(one['memory']['total']):>9} {one['bubble']:>6.1%} "
            f"{one['seconds']['step']:>6.2f} s {one['images_per_second']:>8,.0f} {one['mfu']:>5.0%}"
        )
    best = facts["recommended"]
    where = f", stage {best['fullest_stage']}" if best["layout"]["pp"] > 1 else ""
    lines += ["", f"recommended (*): {describe_layout(Layout(**best['layout']))}"]
    lines += [f"memory of a GPU{where}", *_rows(best["memory"], _gib)]
    lines += _rows({"in the host's memory": best["host_memory"]}, _gib) if best["host_memory"] else []
    lines += ["sent by a GPU in a step", *_rows(best["sent_per_step"], _gib)]
    lines += ["a step", *_rows(best["seconds"], lambda seconds: f"{seconds:.3f} s")]
    lines += [f"the run: {best['gpu_hours']:,.0f} GPU-hours, {best['gpu_hours'] / machine['gpus'] / 24:,.1f} days"]
    lines += [f"largest stage {best['largest_stage_over_mean']:.2f} x the mean"] if best["layout"]["pp"] > 1 else []
    return "\n".join([*lines, "start it with", f"  {facts['command']}"])


def _rows(values: dict[str, float], shown: Any) -> list[str]:
    return [f"  {name:<24} {shown(value):>12}" for name, value in values.items()]


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"
