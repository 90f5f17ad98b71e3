"""What the targets of stage 2 are worth: the demo's transformer trained on four kinds of them, measured alike.

Needs the shards, tokenizer and RQ-VAE of a finished `make demo`. All trainings are equal but for the targets. Then
every model is asked the same: its loss on the held-out shard against exact soft targets (reading codes drawn from Q)
and against the nearest codes (reading those), and pictures of prompts for the demo's judge.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from megarq import ImageGenerator, cli
from megarq.data.code_shards import CodeShards
from megarq.errors import ConfigError
from megarq.files import write_atomically
from megarq.launch.machine import describe_machine
from megarq.parallel.initialization import named_generator

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = "example: python benchmarks/soft_targets.py --demo runs/demo --output runs/soft-targets --seeds 3"
WAYS = {"argmin codes": "argmin", "1 stochastic draw": "draws", "8 draws": "draws", "exact soft targets": "soft"}
FULL_SIZE = {"codes": 8 * 8 * 4 * 2, "latents": 8 * 8 * 256 * 2}
"""Bytes of a stack of codes and of the latents of one picture, 8x8x4 codes with vectors of 256."""
PAIRS = 30_000_000
BATCH = 64


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="what `make demo` wrote")
    parser.add_argument("--output", type=Path, default=Path("runs/soft-targets"), help="folder for codes and runs")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each kind (default 1)")
    parser.add_argument("--drawings", type=int, default=3, help="times that the prompts are drawn (default 3)")
    parser.add_argument("--temperature", type=float, default=0.01, help="of Q (default 0.01, as the demo)")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/soft-targets.json", metavar="OUT")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to all four, such as train.steps=50")
    return parser.parse_intermixed_args(argv)


class Study:
    """The steps; what is finished in the output folder is not done again."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Raises ConfigError where the demo lacks what is needed."""
        self.demo, self.output = args.demo.resolve(), args.output.resolve()
        self.temperature, self.drawings, self.overrides = args.temperature, args.drawings, args.overrides
        for needed in ("shards", "rqvae", "tokenizer.json"):
            if not (self.demo / needed).exists():
                raise ConfigError(f"{self.demo / needed} is missing: make it with `make demo`, or give --demo.")
        sys.path.insert(0, str(ROOT / "tools" / "demo"))  # its files import each other by their bare names
        self.walk = import_module("run")
        self.steps, self.done = 2 + 2 * len(WAYS) * args.seeds, 0

    def step(self, name: str, command: list[str]) -> float:
        """Run a command of the demo; returns seconds."""
        self.done += 1
        return float(self.walk.run_step(self.done, self.steps, name, command))

    def codes(self, draws: int) -> Path:
        """The demo's pictures with so many draws; beside the eight, latents too."""
        folder = self.output / f"codes-{draws}"
        latents = ["--latents"] if draws > 1 else []
        self.step(
            f"codes, {draws} drawn", [*self.walk.pretokenize(self.demo, folder, draws, self.temperature), *latents]
        )
        return folder

    def trained(self, way: str, seed: int, codes: Path) -> dict[str, Any]:
        """Train, export and measure one model."""
        run = self.output / f"{way.replace(' ', '-')}-{seed}"
        finished = run / "measured.json"
        if finished.exists():
            self.done += 2
            return dict(json.loads(finished.read_text(encoding="utf-8")))
        options = [f"objective.targets={WAYS[way]}", f"objective.temperature={self.temperature}", f"train.seed={seed}"]
        command = [*self.walk.train(self.demo, codes, run), *options, *self.overrides]
        seconds = self.step(f"{way}, seed {seed}", command)
        self.step("export", self.walk.export(run, run / "model"))
        generator = ImageGenerator.from_pretrained(run / "model")
        held_out = CodeShards.open(self.output / "codes-8").split(1)[1]
        assert held_out is not None
        result = {"seconds": seconds, **losses(generator, held_out, self.temperature), **self.accuracy(generator)}
        write_atomically(finished, json.dumps(result, indent=2) + "\n")
        return result

    def accuracy(self, generator: ImageGenerator) -> dict[str, float]:
        """How many prompted pictures show the digit asked for, by the demo's judge."""
        texts, asked = self.walk.prompts()
        classifier = self.walk.DigitClassifier(*self.walk.real_pictures()["train"])
        drawn = [draw(generator, texts, 1000 * number) for number in range(self.drawings)]
        found = [classifier.accuracy(self.walk.grey(pictures), asked) for pictures in drawn]
        return {"prompt_accuracy": statistics.mean(found)}


@torch.inference_mode()
def losses(generator: ImageGenerator, held_out: CodeShards, temperature: float) -> dict[str, float]:
    """Cross-entropy per code of a model on samples with latents, of their first captions, in nats.

    `soft_loss` reads codes drawn from Q, the same for every model, and is against Q; `argmin_loss` reads the nearest
    codes and is against them; `entropy` is that of Q, which no model's soft loss can be below.
    """
    sums = dict.fromkeys(("soft_loss", "argmin_loss", "entropy"), 0.0)
    model, rqvae = generator.transformer, generator.rqvae
    for block, size in enumerate(tqdm(held_out.block_sizes.tolist(), desc="held-out blocks")):
        for rows in torch.arange(size).split(BATCH):
            place = torch.full_like(rows, block).numpy(), rows.numpy()
            cond = generator.conditions([held_out.captions(block, row)[0] for row in rows.tolist()])
            nearest = torch.from_numpy(held_out.read_codes(*place).astype("int64"))
            latents = torch.from_numpy(held_out.read_latents(*place))
            seeds = [named_generator(0, "soft targets", block, row) for row in rows.tolist()]
            drawn, soft = rqvae.draw_codes(latents, temperature, seeds)
            sums["soft_loss"] += float(model(drawn, cond, soft)[0].mean()) * len(rows)
            sums["argmin_loss"] += float(model(nearest, cond, nearest)[0].mean()) * len(rows)
            sums["entropy"] += float(torch.special.entr(soft).sum(-1).mean()) * len(rows)
    return {name: value / held_out.samples for name, value in sums.items()}


def stored(codes: CodeShards, way: str) -> dict[str, float]:
    """Bytes that a kind of target needs, without captions: of a sample of these codes, of 30M samples at full size."""
    draws = {"argmin codes": 0, "1 stochastic draw": 1, "8 draws": 8, "exact soft targets": 0}[way]
    blocks = [block for shard in codes.manifest.shards for block in shard.blocks]
    members = ["codes.npy", *(f"draw{number}.npy" for number in range(1, draws + 1))]
    if WAYS[way] == "soft":
        members.append("latents.npy")
    size = sum(block.members[name][1] for block in blocks for name in members)
    full = FULL_SIZE["codes"] * (1 + draws) + FULL_SIZE["latents"] * (WAYS[way] == "soft")
    return {"bytes_per_sample": size / codes.samples, "gigabytes_at_30m": full * PAIRS / 1e9}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation (0 for one value)."""
    return {"mean": statistics.mean(values), "deviation": statistics.stdev(values) if len(values) > 1 else 0.0}


def table(ways: dict[str, Any]) -> str:
    """The results in markdown."""
    lines = [
        "| targets | loss against Q | loss against nearest codes | prompt accuracy | bytes | at 30M |",
        "|---|---|---|---|---|---|",
    ]
    for way, found in ways.items():
        cells = [
            f"{found[name]['mean']:.{digits}f} ± {found[name]['deviation']:.{digits}f}"
            for name, digits in (("soft_loss", 4), ("argmin_loss", 4), ("prompt_accuracy", 3))
        ]
        sizes = f"{found['bytes_per_sample']:,.0f} | {found['gigabytes_at_30m']:,.1f} GB"
        lines.append(f"| {way} | {' | '.join(cells)} | {sizes} |")
    return "\n".join(lines)


def draw(generator: ImageGenerator, texts: list[str], seed: int) -> list[Image.Image]:
    """A picture of each prompt, with the settings that the model states."""
    images = []
    for first in tqdm(range(0, len(texts), 50), desc="drawing", unit="batch"):
        images += generator.generate(prompts=texts[first : first + 50], seed=seed + first)
    return images


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    args = parse(argv)
    study = Study(args)
    folders = {draws: study.codes(draws) for draws in (8, 1)}
    codes = CodeShards.open(folders[8])
    ways: dict[str, Any] = {}
    for way in WAYS:
        folder = folders[1 if way == "1 stochastic draw" else 8]
        found = [study.trained(way, seed, folder) for seed in range(args.seeds)]
        ways[way] = {name: spread([one[name] for one in found]) for name in found[0]} | stored(codes, way)
    command = shlex.join(["python", "benchmarks/soft_targets.py", *(sys.argv[1:] if argv is None else argv)])
    settings = {"seeds": args.seeds, "drawings": args.drawings, "temperature": args.temperature}
    perplexity = codes.manifest.perplexity
    report = {"command": command, **settings, "perplexity_of_q": perplexity, "targets": ways}
    write_atomically(args.json, json.dumps(report | {"machine": describe_machine()}, indent=2) + "\n")
    print(
        f"\n{table(ways)}\n\nentropy of Q, the least possible loss against it: {ways['8 draws']['entropy']['mean']:.4f}"
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
