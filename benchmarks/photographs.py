"""Stage 1 on natural photographs: overfit the 8x8x4 RQ-VAE to crops of those that scikit-learn and scikit-image ship.

The centre of each photograph (with --crops, its corners too) is packed into shards and trained on, mirrored by chance
as the configuration's transform does; the same crops are then measured and drawn. The same command goes on from the
newest checkpoint; with more --steps, so does a finished run. Full width, on a GPU where there is one:
model.channels=128 model.latent_channels=256 model.codebook_dim=256.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from skimage import data as scikit_image
from sklearn.datasets import load_sample_image
from torchvision.transforms.v2.functional import five_crop

from megarq import cli
from megarq.config.load import load_config
from megarq.errors import ConfigError, MegarqError
from megarq.files import atomic_file, make_room, write_atomically
from megarq.launch.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = "example: python benchmarks/photographs.py --output runs/photographs --steps 4000"
MODEL = "rqvae-photographs"
TARGET = 25.0
"""Decibels of PSNR that the mean over the crops should pass."""
PHOTOGRAPHS = {
    "astronaut": scikit_image.astronaut,
    "chelsea": scikit_image.chelsea,
    "china": lambda: load_sample_image("china.jpg"),
    "coffee": scikit_image.coffee,
    "flower": lambda: load_sample_image("flower.jpg"),
    "motorcycle": lambda: scikit_image.stereo_motorcycle()[0],
    "rocket": scikit_image.rocket,
}
"""The colour photographs of daily things inside the two wheels: pixels uint8 [height, width, 3]."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/photographs"), help="folder for crops and the run")
    parser.add_argument(
        "--photographs", nargs="+", choices=list(PHOTOGRAPHS), default=list(PHOTOGRAPHS), help="default: all"
    )
    parser.add_argument("--crops", type=int, choices=range(1, 6), default=1, help="of each photograph (default 1)")
    parser.add_argument("--steps", type=int, help="of training (default: the configuration's)")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/photographs.json", metavar="OUT")
    parser.add_argument(
        "--pictures", type=Path, metavar="OUT.jpg", help="also draw originals and reconstructions by number of depths"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes, such as model.channels=128")
    return parser.parse_intermixed_args(argv)


def write_crops(folder: Path, names: Sequence[str], count: int, side: int) -> None:
    """PNG files NAME-INDEX.png of side x side pixels, cut at the photographs' own scale."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        for index, crop in enumerate(crops(Image.fromarray(PHOTOGRAPHS[name]()), side)[:count]):
            crop.save(folder / f"{name}-{index}.png")


def crops(photograph: Image.Image, side: int) -> list[Image.Image]:
    """The centre first, then the four corners. Raises ConfigError where the photograph is smaller."""
    if min(photograph.size) < side:
        raise ConfigError(
            f"model.resolution={side}: a photograph has {photograph.width}x{photograph.height} pixels. "
            f"Use at most {min(photograph.size)}."
        )
    *corners, centre = five_crop(photograph, [side, side])
    return [centre, *corners]


def run(command: Sequence[str]) -> None:
    """One of the commands that a user types, its output on the screen. Raises MegarqError where it fails."""
    print(f"$ {shlex.join(['python', *command])}", flush=True)
    status = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if status:
        raise MegarqError(f"{command[0]} ended with status {status}: its message stands above.")


def pack(output: Path, request: dict[str, Any]) -> Path:
    """Shards of the crops asked for; what is there is kept. Raises ConfigError where it was made of others."""
    told, shards = output / "crops.json", output / "shards"
    text = json.dumps(request, indent=2) + "\n"
    if told.exists() and told.read_text(encoding="utf-8") != text:
        raise ConfigError(f"--output {output} holds other crops, named in {told}. Give another folder, or remove it.")
    if not told.exists():
        shutil.rmtree(output / "images", ignore_errors=True)
        write_crops(output / "images", **request)
        run(["tools/make_shards.py", "--images", str(output / "images"), "--output", str(shards)])
        write_atomically(told, text)
    return shards


def progress(metrics: Path, points: int = 50) -> list[dict[str, float]]:
    """Mean reconstruction loss of successive stretches of a run, with the last step of each."""
    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    length = max(1, len(steps) // points)
    stretches = [steps[first : first + length] for first in range(0, len(steps), length)]
    return [
        {"step": part[-1]["step"], "reconstruction_loss": sum(step["reconstruction_loss"] for step in part) / len(part)}
        for part in stretches
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Pack, train, measure."""
    args = parse(argv)
    if args.pictures and args.pictures.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"--pictures {args.pictures}: no format of pictures ends so. Name a .png or .jpg.")
    for file in filter(None, (args.json, args.pictures)):
        make_room(file)
    overrides = [*args.overrides, *([f"train.steps={args.steps}"] if args.steps else [])]
    config = load_config(MODEL, overrides, "rq-vae")
    output = args.output.resolve()
    request = {"names": args.photographs, "count": args.crops, "side": config.model.resolution}
    shards = pack(output, request)
    train = ["--ds_config", "zero1.json", "--model", MODEL, "--data", str(shards), "--output", str(output / "rqvae")]
    run(["megarq/train_rqvae.py", *train, *overrides])
    measure = ["--model", str(output / "rqvae"), "--data", str(shards), "--metrics", "psnr,ssim", "--depths"]
    run(["evaluation/reconstruction.py", *measure, "--output", str(output / "scores")])
    scores = json.loads((output / "scores" / "scores.json").read_bytes())
    value = scores["metrics"]["psnr"]["value"]
    report = {
        "command": shlex.join(["python", "benchmarks/photographs.py", *(sys.argv[1:] if argv is None else argv)]),
        "reached": {f"PSNR above {TARGET:.0f} dB": value > TARGET},
        "pictures": scores["count"],
        "step": scores["step"],
        "metrics": scores["metrics"],
        "depths": scores["depths"],
        "codebook": scores["codebook"],
        "training": progress(output / "rqvae" / "metrics.jsonl"),
        "config": asdict(config),
        "machine": describe_machine(),
    }
    write_atomically(args.json, json.dumps(report, indent=2) + "\n")
    if args.pictures:
        sheet = Image.open(output / "scores" / "reconstructions.png")
        with atomic_file(args.pictures) as file:
            sheet.save(file, Image.registered_extensions()[args.pictures.suffix.lower()], quality=90)
    print(f"\nPSNR {value:.2f} dB of {scores['count']} crops; above {TARGET:.0f}: {value > TARGET}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
