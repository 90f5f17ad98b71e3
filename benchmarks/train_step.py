"""Time training steps of any configuration in any layout, on made-up batches, through the engine that trains."""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megarq import cli
from megarq.config.deepspeed import batch_sizes, read_ds_config
from megarq.config.load import load_config
from megarq.config.models import RQVAEConfig
from megarq.config.names import CONFIGS, resolve_name
from megarq.config.run import RQTransformerRunConfig
from megarq.data.loader import CodeBatch
from megarq.data.order import LoaderState
from megarq.engine.build import build_engine
from megarq.engine.kernels import choose_kernels
from megarq.engine.metrics import memory_gib, peak_tflops
from megarq.engine.start import resolve_and_place
from megarq.engine.transformer_run import build_transformer
from megarq.engine.transformer_task import TransformerTask
from megarq.errors import ConfigError
from megarq.files import write_atomically
from megarq.launch.environment import read_environment
from megarq.launch.machine import describe_machine
from megarq.launch.process_group import joined, rank_device
from megarq.parallel.topology import ProcessGroups
from megarq.planning.communication import Links
from megarq.planning.estimate import GIB, Estimate, Machine
from megarq.planning.flops import layer_flops, training_flops
from megarq.planning.layout import Layout
from megarq.planning.plan import make_plan
from megarq.rqvae.model import RQVAE
from megarq.transformer.parameters import decayed

EXAMPLE = """example:
  python benchmarks/train_step.py --model imagenet-1.4b --ds_config zero1.json train.global_batch_size=64 \\
      train.micro_batch_size=32
  torchrun --nproc_per_node 2 benchmarks/train_step.py --model demo --ds_config zero1.json parallel.tp=2 --json OUT"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a name in configs/model, or the path of a YAML file")
    parser.add_argument("--ds_config", default="zero1.json", help="DeepSpeed's JSON, or a name in configs/deepspeed")
    parser.add_argument("--steps", type=int, default=10, help="steps that count (default 10)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument("--json", metavar="OUT", help="write the result to this file")
    parser.add_argument("--trace", metavar="OUT", help="write rank 0's profile of the last step, for chrome://tracing")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    check_options(args)
    config = load_config(args.model, args.overrides, "rq-transformer")
    assert isinstance(config, RQTransformerRunConfig)
    environment = read_environment(os.environ)
    stated = read_ds_config(resolve_name(args.ds_config, CONFIGS / "deepspeed", ".json"))
    ds, topology = resolve_and_place(config, stated, environment.world_size, environment.rank)
    device = rank_device(environment)
    with joined(environment, device):
        groups = ProcessGroups.build(topology, config.parallel.sequence)
        seconds, memory = measure(config, ds, groups, device, args)
    if topology.rank > 0:
        return
    result = summary(config, ds, groups, device, seconds) | {"memory_gib": memory, "model": args.model}
    result |= {"ds_config": args.ds_config, "overrides": args.overrides}
    print(json.dumps(result, indent=2))
    if args.json:
        write_atomically(Path(args.json), json.dumps(result, indent=2) + "\n")


def check_options(args: argparse.Namespace) -> None:
    """Raise ConfigError before anything is measured that could not be counted or written."""
    if args.steps < 1 or args.warm_up < 0:
        raise ConfigError(f"--steps {args.steps} --warm-up {args.warm_up}: give one step or more, after none or more.")
    for file in filter(None, (args.json, args.trace)):
        if not Path(file).absolute().parent.is_dir():
            raise ConfigError(f"{file}: its folder does not exist. Create it first, or name another.")


def measure(
    config: RQTransformerRunConfig,
    ds: dict[str, Any],
    groups: ProcessGroups,
    device: torch.device,
    args: argparse.Namespace,
) -> tuple[list[float], float]:
    """Seconds of each counted step, and the most memory that any rank held in GiB."""
    rqvae = codebook_holder(config)
    module = build_transformer(config, ds, groups, device, layer_flops(config.model), rqvae)
    engine = build_engine(module, config.train, ds, groups, decayed, device)
    task = TransformerTask(
        engine, module=module, config=config, rqvae=rqvae.to(device), tokenizer=None, validation=None, groups=groups,
        device=device, samples_per_epoch=args.steps * config.train.global_batch_size,
    )  # fmt: skip
    accumulation = batch_sizes(config.train, groups.topology.dp)[1]
    micro_batches = task.micro_batches(made_up_batch(config, groups), accumulation)
    seconds = []
    for step in range(args.warm_up + args.steps):
        last = step == args.warm_up + args.steps - 1 and args.trace and groups.topology.rank == 0
        profiler = torch.profiler.profile() if last else None
        start = time.perf_counter()
        if profiler:
            profiler.start()
        task.passes.train(micro_batches, seeds=list(range(accumulation)))["loss"].item()  # .item() waits for the device
        float(engine.get_global_grad_norm())
        if profiler:
            profiler.stop()
            profiler.export_chrome_trace(args.trace)
        seconds.append(time.perf_counter() - start)
    memory = torch.tensor(memory_gib(device), device=device)
    dist.all_reduce(memory, op=dist.ReduceOp.MAX)
    return seconds[args.warm_up :], memory.item()


def codebook_holder(config: RQTransformerRunConfig) -> RQVAE:
    """An untrained RQ-VAE, next to no network around a codebook of the right size."""
    model = config.model
    return RQVAE(
        RQVAEConfig(
            resolution=model.code_shape[0],
            channels=32,
            channel_multipliers=[1],
            res_blocks=1,
            attention_resolutions=[],
            latent_channels=model.codebook_dim,
            codebook_dim=model.codebook_dim,
            codebook_size=model.codebook_size,
            codebook_sizes=model.codebook_sizes,
            depth=model.depth,
            shared_codebook=model.codebook_sizes is None,
        )
    ).requires_grad_(False)


def made_up_batch(config: RQTransformerRunConfig, groups: ProcessGroups) -> CodeBatch:
    """This rank's share of a batch of random codes and captions."""
    model, size = config.model, config.train.global_batch_size // groups.topology.dp
    generator = torch.Generator().manual_seed(groups.topology.data_rank)
    soft = config.objective.targets == "soft"
    return CodeBatch(
        codes=torch.randint(min(model.sizes), (size, *model.code_shape), generator=generator),
        cond=torch.randint(model.cond_vocab_size, (size, model.cond_length), generator=generator),
        latents=torch.randn(size, *model.code_shape[:2], model.codebook_dim, generator=generator) if soft else None,
        weights=torch.ones(size),
        sample_ids=torch.arange(size),
        epochs=torch.zeros(size, dtype=torch.int64),
        state=LoaderState(),
    )


def summary(
    config: RQTransformerRunConfig,
    ds: dict[str, Any],
    groups: ProcessGroups,
    device: torch.device,
    seconds: Sequence[float],
) -> dict[str, Any]:
    """The median step, what it makes in images per second, and the share of the peak that is."""
    topology, train, median = groups.topology, config.train, statistics.median(seconds)
    flops = training_flops(config.model)
    peak = peak_tflops(device, config.log.peak_tflops, train.precision)
    achieved = flops * train.global_batch_size / median / topology.world_size
    planned = plan_alone(config, ds, groups)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": describe_machine(),
        "layout": {"dp": topology.dp, "tp": topology.tp, "pp": topology.pp, "zero": ds["zero_optimization"]["stage"]},
        "kernels": choose_kernels(train.kernels, device, ds).describe(),
        "precision": train.precision,
        "global_batch_size": train.global_batch_size,
        "micro_batch_size": batch_sizes(train, topology.dp)[0],
        "seconds_per_step": {"median": median, "least": min(seconds), "most": max(seconds)},
        "images_per_second": train.global_batch_size / median,
        "tflops_per_device": achieved / 1e12,
        "peak_tflops": peak,
        "mfu": achieved / (peak * 1e12) if peak else None,
        "planned_memory_gib": planned.needed / GIB,
        "planned_host_memory_gib": planned.host / GIB,
    }


def plan_alone(config: RQTransformerRunConfig, ds: dict[str, Any], groups: ProcessGroups) -> Estimate:
    """What the planner expects of the run's own layout, without its reserve for what is not the run's."""
    topology, train = groups.topology, config.train
    micro, accumulation = batch_sizes(train, topology.dp)
    zero = ds["zero_optimization"]
    layout = Layout(
        topology.tp,
        topology.pp,
        topology.dp,
        zero["stage"],
        config.parallel.sequence,
        micro,
        accumulation,
        train.activation_checkpointing,
        train.precision,
        *((zero.get(name) or {}).get("device") == "cpu" for name in ("offload_optimizer", "offload_param")),
        train.ema_decay is not None,
    )
    links = Links(inside=1.0, between=1.0, gpus_per_node=layout.world)
    machine = Machine(layout.world, links, float("inf"), reserve=0.0, peak=1.0, efficiency=1.0, memory_bandwidth=1.0)
    return make_plan(replace(config, train=replace(train, micro_batch_size=micro)), [layout], machine).recommended


if __name__ == "__main__":
    sys.exit(cli.run(main))
