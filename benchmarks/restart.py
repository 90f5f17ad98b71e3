"""What checkpoints and restarts cost: measured on this machine and on a run, computed from that for a larger model.

Measured: copying tensors to the CPU's memory, which training waits for; writing a rank's file with its checksum, which
goes on beside it; verifying and reading it, not from the page cache. Of a run, from its metrics: the share of its time
in which steps waited for checkpoints; and from the start of its command to the first step after its checkpoint.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
from device import timed

from megarq import cli
from megarq.checkpoint.format import Checkpoint, Fragment
from megarq.checkpoint.run_folder import checkpoint_at
from megarq.checkpoint.writer import CheckpointWriter
from megarq.config.load import load_config
from megarq.config.run import CheckpointConfig, RQTransformerRunConfig
from megarq.engine.json_lines import METRICS_FILE, json_lines
from megarq.files import write_atomically
from megarq.launch.machine import describe_machine
from megarq.parallel.topology import Topology
from megarq.planning.counts import transformer_parameters

EXAMPLE = """example:
  python benchmarks/restart.py --run runs/demo/rqtransformer --json benchmarks/results/restart.json \\
      --command "megarq/train.py --ds_config zero1.json --model demo --data runs/demo/codes \\
      --tokenizer runs/demo/tokenizer.json train.steps=490\""""
GB = 1e9
SAVED = 12
"""Bytes of a parameter in a checkpoint: fp32 weights and Adam's two moments; a moving average has 4 more."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="on the storage to measure (default: the temporary folder)")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint that is written (default 2)")
    parser.add_argument("--repeats", type=int, default=3, help="medians of so many turns are told (default 3)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--run", type=Path, help="a finished run, whose checkpoints' cost is told")
    parser.add_argument("--command", help="that trains a copy of it some steps further, without --output")
    parser.add_argument("--model", default="t2i-3.9b", help="that is computed (default t2i-3.9b)")
    parser.add_argument("--gpus", type=int, default=64, help="that train it (default 64)")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument(
        "--images-per-second",
        type=float,
        default=96.46,
        help="of one GPU (default 96.46, measured on an H200: results/train-step-3.9b-h200-compiled.json)",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    measured = bandwidths(args)
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "command": f"python benchmarks/restart.py {shlex.join(sys.argv[1:])}".strip(),
        "device": args.device,
        "checkpoint_gib": args.gib,
        "measured_gb_per_second": measured,
    }
    if args.run:
        result["run"] = of_run(args.run)
    if args.run and args.command:
        result["run"]["restart_seconds"] = restart_seconds(args.run, args.command)
    startup = result.get("run", {}).get("restart_seconds", {}).get("median", 0.0)
    result["computed"] = computed(args, measured, startup)
    print(json.dumps(result, indent=2))
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=2) + "\n")


def bandwidths(args: argparse.Namespace) -> dict[str, float]:
    """GB/s of the four things that are done to a checkpoint, by one process."""
    tensors = {
        f"param/{number}": (Fragment((2**26,)), torch.rand(2**26, device=args.device))
        for number in range(max(1, round(args.gib * 4)))
    }
    size = sum(tensor.nbytes for _, tensor in tensors.values())
    seconds: dict[str, list[float]] = {}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            turn = one_turn(Path(folder), tensors)
        for name, taken in turn.items():
            seconds.setdefault(name, []).append(taken)
    return {name: size / GB / median(taken) for name, taken in seconds.items()}


def one_turn(run: Path, tensors: dict[str, tuple[Fragment, torch.Tensor]]) -> dict[str, float]:
    """Seconds to copy, write, verify and read all tensors through the code that runs use."""
    cpu = torch.device("cpu")
    copied, _ = timed(lambda: {key: tensor.to("cpu", copy=True) for key, (_, tensor) in tensors.items()}, cpu)
    in_memory = {key: (place, tensor.to("cpu")) for key, (place, tensor) in tensors.items()}
    config = CheckpointConfig(asynchronous=False)

    def write() -> None:
        with CheckpointWriter(run, config, Topology(), 0, gather=lambda value: [value]) as writer:
            writer.save(1, in_memory, {"step": 1, "optimizer_step": 1})

    written, _ = timed(write, cpu)
    (folder,) = (run / "checkpoints").glob("step-*")
    forget(folder)
    verified, _ = timed(lambda: Checkpoint.open(folder).verify(), cpu)
    forget(folder)
    checkpoint = Checkpoint.open(folder)
    read, _ = timed(lambda: [checkpoint.tensor(name) for name in checkpoint.names()], cpu)
    return {"copy": copied, "write": written, "verify": verified, "read": read}


def forget(folder: Path) -> None:
    """Let the page cache drop the files of a folder."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def of_run(run: Path) -> dict[str, Any]:
    """How a run's steps waited for its checkpoints."""
    lines = [values for _, values in json_lines(run / METRICS_FILE, "step", "loss", "checkpoint_stall_seconds")]
    stalls = [line["checkpoint_stall_seconds"] for line in lines if line["checkpoint_stall_seconds"]]
    stepping = sum(line["step_seconds"] for line in lines)
    checkpoint = checkpoint_at(run)
    return {
        "steps": len(lines),
        "checkpoint_every": checkpoint.metadata["config"]["checkpoint"]["every"],
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.folder.iterdir()),
        "seconds_per_step": median(line["step_seconds"] for line in lines),
        "stall_seconds": stalls,
        "stall_share": sum(stalls) / (stepping + sum(stalls)),
    }


def restart_seconds(run: Path, command: str, repeats: int = 3) -> dict[str, float]:
    """From the start of a command to the end of the first step that it makes."""
    taken = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "run"
            shutil.copytree(run, copy)
            step = checkpoint_at(copy).metadata["step"]
            start = time.time()
            subprocess.run(
                [sys.executable, *shlex.split(command), "--output", copy], check=True, stdout=subprocess.DEVNULL
            )
            lines = (values for _, values in json_lines(copy / METRICS_FILE, "step", "loss"))
            taken.append(next(line["time"] for line in lines if line["step"] > step) - start)
    return {"median": median(taken), "least": min(taken), "most": max(taken)}


def computed(args: argparse.Namespace, measured: dict[str, float], startup: float) -> dict[str, Any]:
    """The same for a model on many GPUs: every rank copies at the measured rate, every node stores at it."""
    config = load_config(args.model, [], "rq-transformer")
    assert isinstance(config, RQTransformerRunConfig)
    size = SAVED * transformer_parameters(config.model).trainable_total
    nodes = ceil(args.gpus / args.gpus_per_node)
    step = config.train.global_batch_size / (args.gpus * args.images_per_second)
    interval = config.checkpoint.every * step
    stall = size / args.gpus / GB / measured["copy"]
    of_a_node = size / nodes / GB
    reading = of_a_node / measured["verify"] + of_a_node / measured["read"]
    return {
        "model": args.model,
        "gpus": args.gpus,
        "nodes": nodes,
        "checkpoint_bytes": size,
        "seconds_per_step": step,
        "checkpoint_every": config.checkpoint.every,
        "seconds_between_checkpoints": interval,
        "stall_seconds": stall,
        "stall_share": stall / (interval + stall),
        "writing_seconds": of_a_node / measured["write"],
        "restart_seconds": startup + reading,
        "of_which_reading_seconds": reading,
        "lost_seconds_after_a_death": interval / 2,
    }


if __name__ == "__main__":
    sys.exit(cli.run(main))
