"""The most memory that scoring takes: 50,000 pictures of 256x256 against as many, by all metrics of Inception.

The pictures are hard links to a few real PNG files, so that all are read and decoded. Inception has random weights, and
takes seconds for each batch on a CPU: there a stand-in gives 2,048 features and 1,008 logits in its place, and what the
network adds is measured apart, on one batch; everything else is what score.py runs. Each measurement is a new process.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scoring_protocols import random_weights
from torch import Tensor

from megarq import cli
from megarq.data.pictures import open_pictures
from megarq.files import write_atomically
from megarq.launch.machine import describe_machine
from megarq.scoring import evaluate as scoring
from megarq.scoring.features import extract
from megarq.scoring.networks import FeatureNetwork, build_network
from megarq.scoring.protocols import FEATURES, PROTOCOLS
from megarq.scoring.weights import Weights

EXAMPLE = "example:\n  python benchmarks/scoring_memory.py --json benchmarks/results/scoring-memory.json"
DISTINCT = 32
"""Picture files behind the links."""
GIB = 2**30


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=50_000, help="pictures on either side (default 50000)")
    parser.add_argument("--side", type=int, default=256, help="of the pictures (default 256)")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="rq-paper", help="of the scores (default rq-paper)")
    parser.add_argument("--metrics", default="fid,is,kid,prc", help="metrics to compute (default fid,is,kid,prc)")
    parser.add_argument("--bootstrap", type=int, default=0, help="resamples (default none)")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures in one pass (default 64)")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda, where the network is the real one")
    parser.add_argument("--folder", type=Path, help="where the pictures are made; default: the temporary folder")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result to this file")
    parser.add_argument("--here", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    if args.here:
        what, folder = args.here
        print(json.dumps(score(Path(folder), args) if what == "scoring" else pass_batch(Path(folder), args)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        for part, seed in (("images", 0), ("reference", 1)):
            make_pictures(Path(name) / part, args.count, args.side, seed)
        make_pictures(Path(name) / "batch", args.batch_size, args.side, 2)
        steps = ("scoring",) if args.device == "cuda" else ("scoring", "inception")
        measured = {what: in_new_process(what, Path(name), args) for what in steps}
    result = {
        "machine": describe_machine(),
        "command": f"python benchmarks/scoring_memory.py {shlex.join(sys.argv[1:])}".strip(),
        "protocol": args.protocol,
        "pictures": f"{args.count} of {args.side}x{args.side} on either side, links to {DISTINCT} files each",
        **measured,
    }
    if "inception" in measured:
        alone = measured["inception"]["peak_gib"] - measured["inception"]["before_gib"]
        result["network"] = "a stand-in of 2,048 features and 1,008 logits; Inception's memory is of one batch"
        result["peak_gib_with_inception"] = round(measured["scoring"]["peak_gib"] + alone, 2)
    print(json.dumps(result, indent=2))
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=2) + "\n")


def make_pictures(folder: Path, count: int, side: int, seed: int) -> None:
    """So many names of a few pictures, smooth enough to be of a photograph's size."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    files = []
    for number in range(min(DISTINCT, count)):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
        files.append(folder / f"{number:06d}.png")
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(files[-1])
    for number in range(len(files), count):
        os.link(files[number % len(files)], folder / f"{number:06d}.png")


def in_new_process(what: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What a measurement of this script says of itself."""
    command = [sys.executable, __file__, "--here", what, str(folder), "--metrics", args.metrics]
    command += ["--batch-size", str(args.batch_size), "--bootstrap", str(args.bootstrap)]
    command += ["--device", args.device, "--protocol", args.protocol]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


def score(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All of score.py, on a CPU behind the stand-in."""
    device = torch.device(args.device)
    weights = {}
    if device.type == "cuda":
        weights["inception"] = random_weights(folder).path
    else:
        stand_in()
    request = scoring.Request(
        images=str(folder / "images"),
        reference=str(folder / "reference"),
        protocol=PROTOCOLS[args.protocol],
        metrics=tuple(args.metrics.split(",")),
        device=device,
        weights=weights,
        bootstrap=args.bootstrap,
        batch_size=args.batch_size,
    )
    before, start = peak_gib(), time.perf_counter()
    scored = scoring.evaluate(request)
    seconds = time.perf_counter() - start
    measured = {
        "count": scored.features.count,
        "metrics": list(scored.metrics),
        "before_gib": before,
        "peak_gib": peak_gib(),
        "seconds": round(seconds),
    }
    if device.type == "cuda":
        measured["device"] = torch.cuda.get_device_name()
        measured["peak_gib_on_device"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        measured["images_per_second"] = round(2 * args.count / seconds)
    return measured


def stand_in() -> None:
    """Put features of next to no cost in Inception's place."""
    projection = torch.randn(3 * 16 * 16, 2048 + 1008, generator=torch.Generator().manual_seed(0)) / 16

    def build(name: str, protocol: Any, layers: Sequence[str], *_: Any) -> FeatureNetwork:
        def see(pixels: Tensor) -> tuple[Tensor, ...]:
            seen = F.adaptive_avg_pool2d(pixels.float() / 255, 16).flatten(1) @ projection
            return tuple(seen[:, :2048] if layer == FEATURES else seen[:, 2048:] for layer in layers)

        weights = Weights(name, Path("stand-in"))
        weights.__dict__["sha256"] = "0" * 64  # there is no file
        return FeatureNetwork(name, tuple(layers), see, weights, 2048, protocol.resize)

    scoring.build_network = build  # type: ignore[assignment]
    scoring.find_weights = lambda *_: None  # type: ignore[assignment]


def pass_batch(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One batch through the real network, with random weights."""
    protocol, device = PROTOCOLS[args.protocol], torch.device("cpu")
    before = peak_gib()
    weights = random_weights(folder)
    layers = [FEATURES, protocol.logits]
    network = build_network("inception", protocol, layers, weights, device)
    start = time.perf_counter()
    hold = [("inception", layer) for layer in layers]
    extract(open_pictures(folder / "batch"), [network], device, batch_size=args.batch_size, hold=hold)
    seconds = time.perf_counter() - start
    return {
        "batch_size": args.batch_size,
        "before_gib": before,
        "peak_gib": peak_gib(),
        "images_per_second": round(args.batch_size / seconds, 1),
    }


def peak_gib() -> float:
    """The most memory that this process ever had."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(status["VmHWM"].split()[0]) * 1024 / GIB, 2)


if __name__ == "__main__":
    sys.exit(cli.run(main))
