"""Plan a run: memory, communication and time of every lawful layout, and the command that starts the best one."""

import argparse
import json
import sys
from collections.abc import Sequence
from math import inf
from typing import Any

from megarq import cli
from megarq.config.load import load_config
from megarq.errors import ConfigError
from megarq.planning.communication import Links
from megarq.planning.dry_run import dry_run
from megarq.planning.estimate import GIB, Machine
from megarq.planning.layouts import CHOICES, chosen_layouts, lawful_layouts
from megarq.planning.plan import facts, make_plan, render

MOST_GPUS = 65_536
PEAK_TFLOPS = {"bf16": 989.0, "fp32": 67.0}
"""Dense, of an H100 SXM, by train.precision: nothing here lets matrices of fp32 be multiplied in TF32."""
EXAMPLE = """example:
  python tools/plan.py --model t2i-3.9b --gpus 64 --gpu-memory 80 --global-batch 2048
  python tools/plan.py --model t2i-20b --gpus 512 --gpu-memory 80 --json
  python tools/plan.py --model t2i-3.9b --gpus 512 --dry-run --layout tp=8,pp=4"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; the speeds' defaults are an H100 SXM's data sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a name in configs/model, or the path of a YAML file")
    add("--gpus", type=int, required=True, help="GPUs in all")
    add("--gpus-per-node", type=int, default=8, help="GPUs in a node (default 8)")
    add("--gpu-memory", type=float, default=80, help="GiB of one GPU (default 80)")
    add("--reserve", type=float, default=4, help="GiB kept free: context, NCCL, RQ-VAE, fragmentation (default 4)")
    add("--global-batch", type=int, help="images in an optimiser step (default: the configuration's)")
    add("--images", type=float, default=30e6, help="images in the data set (default 30e6)")
    add("--epochs", type=float, help="passes over them (default: the configuration's epochs or steps)")
    add("--peak-tflops", type=float, help="dense peak of one GPU (default 989; with train.precision=fp32, 67)")
    add("--efficiency", type=float, default=0.5, help="share of the peak that computing reaches (default 0.5)")
    add("--memory-gb-s", type=float, default=3350, help="GB/s of a GPU's memory (default 3350)")
    add("--link-gb-s", type=float, default=450, help="GB/s one way between a node's GPUs (default 450)")
    add("--node-link-gb-s", type=float, default=50, help="GB/s one way between nodes, for each GPU (default 50)")
    add("--layout", help="these layouts alone, such as tp=8,pp=4,zero=1")
    add("--dry-run", action="store_true", help="rehearse the recommended layout: build every shard, without memory")
    add("--json", action="store_true", help="print JSON instead of a page")
    add("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    check_options(args)
    check_not_planned(args.overrides)
    overrides = list(args.overrides)
    if args.global_batch:
        overrides.append(f"train.global_batch_size={args.global_batch}")
    if args.epochs:
        overrides += ["train.steps=null", f"train.epochs={args.epochs:g}"]
    config = load_config(args.model, overrides, "rq-transformer")
    train = config.train
    machine = read_machine(args, train.precision)
    images = train.steps * train.global_batch_size if train.steps else args.images * (train.epochs or 0)
    layouts = list(lawful_layouts(config, args.gpus, args.gpus_per_node))
    if args.layout:
        layouts = chosen_layouts(args.layout, layouts)
    numbers: dict[str, Any] = {}
    pages = []
    rehearsed = layouts[0]
    try:
        plan = make_plan(config, layouts, machine)
    except ConfigError as error:
        if not args.dry_run:
            raise
        pages.append(f"{error}\n\nThe dry run needs no memory; of the layouts asked for it takes the plainest.")
        numbers["does_not_fit"] = str(error)
    else:
        rehearsed = plan.recommended.layout
        numbers = facts(plan, args.model, config, machine, images, overrides)
        pages.append(render(numbers))
    if args.dry_run:
        rehearsal = dry_run(config.model, rehearsed)
        numbers["dry_run"] = rehearsal.facts()
        pages.append(rehearsal.render())
    print(json.dumps(numbers, indent=2) if args.json else "\n\n".join(pages))


def check_not_planned(overrides: Sequence[str]) -> None:
    """Raise ConfigError where the command line sets what the planner chooses."""
    for text in overrides:
        key, _, value = text.partition("=")
        section, _, name = key.partition(".")
        if name in CHOICES and section in ("parallel", "train"):
            raise ConfigError(f"{text}: the planner chooses it. Use --layout {name}={value} to plan for that alone.")


def check_options(args: argparse.Namespace) -> None:
    """Raise ConfigError where numbers of the command line are none that GPUs have."""
    positive = ("gpus", "gpus_per_node", "gpu_memory", "images", "peak_tflops", "efficiency", "memory_gb_s")
    for name in (*positive, "link_gb_s", "node_link_gb_s", "global_batch", "epochs"):
        value = getattr(args, name)
        if value is not None and not (0 < value < inf):
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: give a number above 0.")
    if args.gpus > MOST_GPUS:
        raise ConfigError(f"--gpus {args.gpus}: give {MOST_GPUS:,} at most.")
    if args.efficiency > 1:
        raise ConfigError(f"--efficiency {args.efficiency:g}: it is a share of the peak. Give at most 1.")
    if not 0 <= args.reserve < args.gpu_memory:
        raise ConfigError(
            f"--reserve {args.reserve:g} of --gpu-memory {args.gpu_memory:g} GiB: give 0 or more, and less than all."
        )


def read_machine(args: argparse.Namespace, precision: str) -> Machine:
    """What the options say of the GPUs; the peak is one of products in `precision`."""
    links = Links(args.link_gb_s * 1e9, args.node_link_gb_s * 1e9, args.gpus_per_node)
    return Machine(
        args.gpus,
        links,
        args.gpu_memory * GIB,
        args.reserve * GIB,
        (args.peak_tflops or PEAK_TFLOPS[precision]) * 1e12,
        args.efficiency,
        args.memory_gb_s * 1e9,
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
