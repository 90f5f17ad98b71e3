"""Whether adversarial training of stage 1 holds: `rqvae-demo-gan` on the digits, over seeds and lengths.

Every seed is trained for each multiple of the configuration's steps, with the discriminator and without, all else
equal. A run is measured on the held-out digits (a classifier names the reconstructions), its codes on all digits. It
has diverged where a loss is not finite, or where the reconstruction loss of its last steps is far above its lowest.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarq import cli
from megarq.config.load import load_config
from megarq.engine.pictures import labelled_rows, save_png
from megarq.errors import MegarqError
from megarq.files import write_atomically
from megarq.inference.pretrained import load_rqvae
from megarq.launch.machine import describe_machine
from megarq.rqvae.health import use_of
from megarq.rqvae.model import RQVAE

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = "example: python benchmarks/rqvae_gan.py --output runs/rqvae-gan --seeds 5 --lengths 1 3 --jobs 2"
MODEL = "rqvae-demo-gan"
KINDS = {"adversarial": [], "reconstruction alone": ["loss.adversarial_weight=0"]}
WINDOW, RISE = 20, 1.5
"""A run has diverged where the mean reconstruction loss of the last steps is so many times the lowest mean before."""
ACCURACY, PERPLEXITY = 0.95, 0.4
"""What every adversarial run should reach: share of reconstructions named rightly; perplexity of each depth over K."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/rqvae-gan"), help="folder for digits and runs")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each kind and length (default 5)")
    parser.add_argument("--plain-seeds", type=int, help="those without a discriminator (default: as many)")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="default: both")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 3], help="multiples of the steps (default 1 3)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, one process each (default 1)")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/rqvae-gan.json", metavar="OUT")
    parser.add_argument("--pictures", type=Path, help="also draw originals beside reconstructions of the first seed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to all runs, such as train.lr=5e-4")
    return parser.parse_intermixed_args(argv)


class Study:
    """The runs; what is finished in the output folder is not done again."""

    def __init__(self, output: Path, overrides: Sequence[str]) -> None:
        """Writes the digits and their shards."""
        self.output, self.overrides = output.resolve(), list(overrides)
        config = load_config(MODEL, self.overrides, "rq-vae")
        assert config.train.steps is not None
        self.steps = config.train.steps
        sys.path.insert(0, str(ROOT / "tools" / "demo"))  # its files import each other by their bare names
        demo, self.judge = import_module("run"), import_module("judge")
        self.real = demo.real_pictures()
        if not (self.output / "shards").exists():
            walk = demo.walk(self.output, False)
            for number, name in enumerate(("images", "shards", "validation shards"), start=1):
                demo.run_step(number, 3, name, walk[name])

    def measured(self, kind: str, length: int, seed: int) -> dict[str, Any]:
        """Train one model and measure it."""
        run = self.folder(kind, length, seed)
        finished = run / "measured.json"
        if not finished.exists():
            seconds = self._train(run, [f"train.steps={self.steps * length}", f"train.seed={seed}", *KINDS[kind]])
            found = {"seconds": round(seconds, 1), **self._judged(load_rqvae(run)), **stability(run / "metrics.jsonl")}
            write_atomically(finished, json.dumps(found, indent=2) + "\n")
        return dict(json.loads(finished.read_text(encoding="utf-8")))

    def folder(self, kind: str, length: int, seed: int) -> Path:
        """Of one run."""
        return self.output / f"{kind.replace(' ', '-')}-x{length}-seed{seed}"

    def name(self, kind: str, length: int) -> str:
        """Of the runs of a kind and length, for people."""
        return f"{kind}, {self.steps * length} steps"

    def held_out(self, count: int | None = None) -> Tensor:
        """Held-out digits [n, 3, 32, 32] in [-1, 1]."""
        return as_images(self.real["validation"][0][:count])

    def _train(self, run: Path, options: list[str]) -> float:
        data = ["--data", f"{self.output}/shards/train-*.tar", "--output", str(run)]
        command = [sys.executable, "megarq/train_rqvae.py", "--ds_config", "zero1.json", "--model", MODEL, *data]
        quiet = ["log.validate_every=0", "log.sample_every=0"]
        print(f"$ {shlex.join(['python', *command[1:], *options])}", flush=True)
        run.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with (run / "log.txt").open("w", encoding="utf-8") as log:
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [*command, *quiet, *self.overrides, *options], cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT
            )
        if done.returncode:
            raise MegarqError(f"the run in {run} ended with status {done.returncode}: read its log.txt.")
        return time.monotonic() - start

    @torch.inference_mode()
    def _judged(self, model: RQVAE) -> dict[str, Any]:
        rebuilt = reconstructed(model, self.held_out())
        classifier = self.judge.DigitClassifier(*self.real["train"])
        codes = [model.quantize(model.encode(batch)) for part in self.real.values() for batch in parts(part[0])]
        stacks = torch.cat(codes).flatten(0, 2)
        shares = [
            use_of(torch.bincount(stacks[:, depth], minlength=size)).perplexity / size
            for depth, size in enumerate(model.config.sizes)
        ]
        return {
            "reconstruction_accuracy": classifier.accuracy(as_grey(rebuilt), self.real["validation"][1]),
            "mean_squared_error": float((rebuilt - self.held_out()).square().mean()),
            "sharpness": sharpness(rebuilt) / sharpness(self.held_out()),
            "perplexity_over_k": shares,
        }


def as_images(pictures: Any) -> Tensor:
    """Grey levels [n, 32, 32] from 0 to 1 as images [n, 3, 32, 32] in [-1, 1]."""
    return torch.from_numpy(pictures).float().mul(2).sub(1).unsqueeze(1).expand(-1, 3, -1, -1)


def as_grey(images: Tensor) -> Any:
    """The way back, clamped."""
    return images.mean(1).add(1).div(2).clamp(0, 1).double().numpy()


def parts(pictures: Any) -> Sequence[Tensor]:
    """Batches of images."""
    return as_images(pictures).split(200)


@torch.inference_mode()
def reconstructed(model: RQVAE, images: Tensor) -> Tensor:
    """Images after the RQ-VAE."""
    return torch.cat([model.decode(model.quantize(model.encode(batch))) for batch in images.split(200)]).clamp(-1, 1)


def sharpness(images: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels."""
    return float((images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()) / 2)


def stability(metrics: Path) -> dict[str, Any]:
    """Whether a run has diverged, and where its losses ended."""
    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses = [step["reconstruction_loss"] for step in steps]
    finite = all(step["loss"] is not None and math.isfinite(step["loss"]) for step in steps)
    found: dict[str, Any] = {"diverged": True}
    if finite:
        window = min(WINDOW, len(losses))
        means = [statistics.mean(losses[first : first + window]) for first in range(len(losses) - window + 1)]
        rise = means[-1] / min(means)
        found = {"diverged": rise > RISE, "last_over_lowest": rise}
    for name in ("reconstruction_loss", "adaptive_weight", "discriminator_loss", "logits_real", "logits_fake"):
        values = [step[name] for step in steps[-WINDOW:] if step.get(name) is not None]
        if values:
            found[name] = statistics.mean(values)
    return found


def enlarged(images: Tensor) -> Tensor:
    """Images of twice the side, each pixel a square."""
    return images.repeat_interleave(2, -1).repeat_interleave(2, -2)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst and the mean of the seeds of one kind and length."""
    columns = {
        name: [run[name] for run in runs] for name in ("reconstruction_accuracy", "mean_squared_error", "sharpness")
    }
    return {
        "seeds": len(runs),
        "accuracy_lowest": min(columns["reconstruction_accuracy"]),
        "accuracy_mean": statistics.mean(columns["reconstruction_accuracy"]),
        "mean_squared_error": statistics.mean(columns["mean_squared_error"]),
        "sharpness": statistics.mean(columns["sharpness"]),
        "perplexity_over_k_lowest": [
            min(shares) for shares in zip(*(r["perplexity_over_k"] for r in runs), strict=True)
        ],
        "diverged": sum(run["diverged"] for run in runs),
        "last_over_lowest": max(run.get("last_over_lowest", math.inf) for run in runs),
    }


def table(summaries: dict[str, Any]) -> str:
    """The results in markdown."""
    heads = ("training", "seeds", "accuracy, lowest (mean)", "MSE", "sharpness", "lowest perplexity / K", "diverged")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, found in summaries.items():
        shares = " ".join(f"{share:.2f}" for share in found["perplexity_over_k_lowest"])
        accuracy = f"{found['accuracy_lowest']:.3f} ({found['accuracy_mean']:.3f})"
        numbers = f"{found['mean_squared_error']:.4f} | {found['sharpness']:.2f}"
        lines.append(f"| {name} | {found['seeds']} | {accuracy} | {numbers} | {shares} | {found['diverged']} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    args = parse(argv)
    study = Study(args.output, args.overrides)
    plain = args.seeds if args.plain_seeds is None else args.plain_seeds
    groups = [(kind, length) for kind in args.kinds for length in args.lengths]
    seeds = {group: range(plain if KINDS[group[0]] else args.seeds) for group in groups}
    wanted = [(*group, seed) for group in groups for seed in seeds[group]]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = dict(zip(wanted, pool.map(lambda one: study.measured(*one), wanted), strict=True))
    summaries = {study.name(*group): summary([found[(*group, seed)] for seed in seeds[group]]) for group in groups}
    adversarial = [found[one] for one in wanted if one[0] == "adversarial"]
    reached = {
        f"accuracy of {ACCURACY}": all(run["reconstruction_accuracy"] >= ACCURACY for run in adversarial),
        f"perplexity above {PERPLEXITY} K": all(min(run["perplexity_over_k"]) > PERPLEXITY for run in adversarial),
        "no divergence": not any(run["diverged"] for run in adversarial),
    }
    if args.pictures:
        rows = {"originals": study.held_out(12)}
        for group in groups:
            rows[study.name(*group)] = reconstructed(load_rqvae(study.folder(*group, 0)), study.held_out(12))
        save_png(args.pictures, labelled_rows([(name, enlarged(images)) for name, images in rows.items()]))
    report = {
        "command": shlex.join(["python", "benchmarks/rqvae_gan.py", *(sys.argv[1:] if argv is None else argv)]),
        "reached": reached,
        "trainings": summaries,
        "runs": {f"{study.name(*one[:2])}, seed {one[2]}": found[one] for one in wanted},
        "machine": describe_machine(),
    }
    write_atomically(args.json, json.dumps(report, indent=2) + "\n")
    print(f"\n{table(summaries)}\n\n{', '.join(f'{name}: {ok}' for name, ok in reached.items())}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
