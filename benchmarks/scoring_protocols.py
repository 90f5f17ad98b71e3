"""The same pictures under the three protocols, and how much each difference between them matters.

Either --images and --reference, or made-up pictures: the reference is crops of scikit-learn's two photographs, the
images are other crops, made smaller and larger again, as an autoencoder would blur them. Only of made-up pictures are
there floats that were never rounded to 8 bits, which is what the paper's authors score. Without --feature-weights
Inception has random weights: the differences then show the protocols' pixels, not published numbers.
"""

import argparse
import io
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from megarq import cli
from megarq.data.pictures import open_pictures
from megarq.files import write_atomically
from megarq.inference.pretrained import find_device
from megarq.launch.machine import describe_machine
from megarq.scoring import scores
from megarq.scoring.evaluate import Request, evaluate
from megarq.scoring.features import extract
from megarq.scoring.networks import FeatureNetwork
from megarq.scoring.protocols import FEATURES, INCEPTION_SIDE, PROTOCOLS, CleanInception, RqPaperInception
from megarq.scoring.scores import ScoreSettings
from megarq.scoring.statistics import statistics_of, to_statistics
from megarq.scoring.weights import Weights, find_weights, read_state

EXAMPLE = """examples:
  python benchmarks/scoring_protocols.py --json benchmarks/results/scoring-protocols.json
  python benchmarks/scoring_protocols.py --images drawn/ --reference real/ --feature-weights inception.pth"""
PAPER = PROTOCOLS["rq-paper"]


class AlignedCorners(RqPaperInception):
    """rq-paper with the corners' pixels aligned, as some evaluations resize."""

    @staticmethod
    def prepare(pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> [B, 3, 299, 299] in [-1, 1]."""
        side = (INCEPTION_SIDE, INCEPTION_SIDE)
        return 2 * F.interpolate(pixels.float() / 255, size=side, mode="bilinear", align_corners=True) - 1


class RoundedClean(CleanInception):
    """clean with Pillow's own 8-bit resize, which rounds and clips."""

    @staticmethod
    def prepare(pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> [B, 3, 299, 299] in [-1, 1]."""
        return (CleanInception.prepare(pixels).mul(128).add(128).round().clamp(0, 255) - 128) / 128


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", help="pictures to score; by default they are made")
    parser.add_argument("--reference", help="pictures to compare them with")
    parser.add_argument("--count", type=int, default=128, help="made-up pictures on either side (default 128)")
    parser.add_argument("--side", type=int, default=256, help="of made-up pictures (default 256)")
    parser.add_argument("--feature-weights", type=Path, help="Inception's file; by default random weights")
    parser.add_argument("--seed", type=int, default=0, help="of made-up pictures and random weights (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, .. (default cpu)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    device = find_device(args.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = find_weights("inception", args.feature_weights) if args.feature_weights else random_weights(folder)
        floats = None
        images, reference = args.images, args.reference
        if images is None or reference is None:
            floats = make_pictures(folder, args.count, args.side, args.seed)
            images, reference = str(folder / "images"), str(folder / "reference")
        rows = {name: score(name, images, reference, weights, device) for name in PROTOCOLS}
        variants: dict[str, Callable[[], float]] = {
            "rq-paper, align_corners=True": lambda: fid(AlignedCorners, images, reference, weights, device),
            "clean, resized in 8 bits": lambda: fid(RoundedClean, images, reference, weights, device),
        }
        if floats is not None:
            variants["rq-paper, floats never rounded"] = lambda: fid_of_floats(floats, reference, weights, device)
        rows |= {name: {"fid": measure()} for name, measure in variants.items()}
        sha256 = weights.sha256
    result = {
        "machine": describe_machine(),
        "command": f"python benchmarks/scoring_protocols.py {shlex.join(sys.argv[1:])}".strip(),
        "weights": {"sha256": sha256, "random": args.feature_weights is None},
        "pictures": f"{args.count} crops of two photographs on either side"
        if floats is not None
        else [images, reference],
        "scores": rows,
    }
    print(table(rows))
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=2) + "\n")


def score(protocol: str, images: str, reference: str, weights: Weights, device: torch.device) -> dict[str, float]:
    """All that Inception measures, under a protocol."""
    few = len(open_pictures(images))
    request = Request(
        *(images, reference, PROTOCOLS[protocol], ("fid", "is", "kid", "prc"), device),
        weights={"inception": weights.path},
        settings=ScoreSettings(kid_subset_size=max(2, few // 2), is_splits=min(10, max(1, few // 8))),
    )
    return {name: metric["value"] for name, metric in evaluate(request).metrics.items()}


def build(kind: type[nn.Module], weights: Weights, device: torch.device) -> FeatureNetwork:
    """A variant of Inception's extractor, from a file."""
    tensors = io.BytesIO()
    torch.save(read_state(weights.path), tensors)
    tensors.seek(0)
    module = kind("variant", [FEATURES], feature_extractor_weights_path=tensors).to(device)  # type: ignore[call-arg]
    return FeatureNetwork("inception", (FEATURES,), module, weights, 2048, kind.__name__)


def fid(kind: type[nn.Module], images: str, reference: str, weights: Weights, device: torch.device) -> float:
    """FID with a variant of a protocol's resize on both sides."""
    network, layer = build(kind, weights, device), ("inception", FEATURES)
    ours, theirs = (
        statistics_of(extract(open_pictures(source), [network], device, summed=[layer]), "inception", PAPER)
        for source in (images, reference)
    )
    return scores.frechet(ours, theirs)


@torch.no_grad()
def fid_of_floats(floats: Tensor, reference: str, weights: Weights, device: torch.device) -> float:
    """FID of pictures [N, 3, H, W] in [0, 1] as they were before rounding; the reference's are files."""
    network = build(RqPaperInception, weights, device)
    ours = torch.cat([network.module(part.to(device))[0].cpu() for part in floats.split(64)])
    theirs = extract(open_pictures(reference), [network], device, summed=[("inception", FEATURES)])
    return scores.frechet(to_statistics(ours, PAPER), statistics_of(theirs, "inception", PAPER))


def make_pictures(folder: Path, count: int, side: int, seed: int) -> Tensor:
    """Write images/ and reference/; the images as floats [N, 3, side, side] in [0, 1], before rounding."""
    from sklearn.datasets import load_sample_images

    photographs = [
        torch.from_numpy(photo.copy()).permute(2, 0, 1).float() / 255 for photo in load_sample_images().images
    ]
    rng = np.random.default_rng(seed)

    def crop() -> Tensor:
        photo = photographs[rng.integers(len(photographs))]
        top, left = (int(rng.integers(length - side + 1)) for length in photo.shape[1:])
        return photo[:, top : top + side, left : left + side]

    floats = []
    for name in ("reference", "images"):
        (folder / name).mkdir()
        for number in range(count):
            picture = crop()
            if name == "images":
                smaller = F.interpolate(picture[None], scale_factor=0.5, mode="bilinear", antialias=True)
                picture = F.interpolate(smaller, size=(side, side), mode="bicubic")[0].clamp(0, 1)
                floats.append(picture)
            pixels = picture.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / name / f"{number:05d}.png")
    return torch.stack(floats)


def random_weights(folder: Path, seed: int = 0) -> Weights:
    """Inception with weights that keep the scale of what passes through, and logits large enough to score."""

    class Unloaded(CleanInception):
        def load_state_dict(self, *_: Any, **__: Any) -> Any:
            return None

    torch.save({}, folder / "empty.pth")
    torch.manual_seed(seed)
    network = Unloaded("random", [FEATURES], feature_extractor_weights_path=folder / "empty.pth")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    with torch.no_grad():
        network.fc.weight *= 30
        network.fc.bias *= 100
    torch.save(network.state_dict(), folder / "inception.pth")
    return Weights("inception", folder / "inception.pth")


def table(rows: dict[str, dict[str, float]]) -> str:
    """One line for each protocol and variant, with the FID's difference from rq-paper's."""
    names = list(next(iter(rows.values())))
    base = rows["rq-paper"]["fid"]
    lines = ["".join([f"{'':32}", *(f"{name:>12}" for name in names), f"{'fid - rq-paper':>18}"])]
    for name, row in rows.items():
        cells = [f"{row[metric]:12.5g}" if metric in row else f"{'':12}" for metric in names]
        lines.append("".join([f"{name:32}", *cells, f"{row['fid'] - base:18.4g}"]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.run(main))
