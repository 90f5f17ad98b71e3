"""Measure how well an RQ-VAE gives pictures back: rFID, PSNR, SSIM, LPIPS, its codebook, and error by depth."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megarq import cli
from megarq.errors import ConfigError
from megarq.files import make_room, write_atomically
from megarq.inference.pretrained import find_device
from megarq.launch.environment import read_environment
from megarq.launch.process_group import rank_device
from megarq.scoring.protocols import PROTOCOLS, find_protocol
from megarq.scoring.reconstruction import METRICS, SHOWN, TRANSFORMS, ReconstructionRequest, reconstruct
from megarq.scoring.reconstruction_result import draw_sheet, to_result, to_table
from megarq.scoring.result import write_result
from megarq.scoring.weights import add_feature_weights, parse_weights

EXAMPLE = """examples:
  torchrun --nproc_per_node 8 evaluation/reconstruction.py --model runs/rqvae --data 'imagenet-val/{00..49}.tar' \\
      --transform center --depths --output scores/rqvae
  python evaluation/reconstruction.py --model models/rqvae --data ffhq --metrics psnr,ssim --json rqvae.json

The numbers do not depend on the number of ranks. Networks are not downloaded: each file is given, or lies in torch's
cache under its published name, which the error says where it is missing; psnr and ssim need none."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="an exported model, an RQ-VAE folder, code shards, or the --output of train_rqvae.py",
    )
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="PICTURES",
        help="folders, tars (paths, globs, {00..49}), LMDB or picture sets, one after another",
    )
    parser.add_argument(
        "--transform",
        default="none",
        choices=list(TRANSFORMS),
        help="center: short side to the model's resolution, then the centre; none: pictures of it (default)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for scores.json and reconstructions.png")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result to this file")
    parser.add_argument(
        "--protocol",
        default="rq-paper",
        metavar="NAME",
        help=f"how pictures become an rFID: {', '.join(PROTOCOLS)}, or a file.py (default: %(default)s)",
    )
    parser.add_argument("--metrics", default=",".join(METRICS), help="some of %(default)s (the default)")
    add_feature_weights(parser)
    parser.add_argument("--perceptual-weights", type=Path, metavar="FILE", help="VGG16's weights, for lpips")
    parser.add_argument("--depths", action="store_true", help="measure the first 1, 2 .. depths alone, too")
    parser.add_argument("--count", type=int, metavar="N", help="take N pictures, spread evenly over the data")
    parser.add_argument("--step", type=int, help="of a run's checkpoint (default: the newest whole one)")
    parser.add_argument(
        "--weights", choices=["ema", "param"], help="of a run (default: the moving average where it kept one)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="pictures in one pass (default: %(default)s)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu ...; by default this rank's GPU if there is one")
    parser.add_argument(
        "--threads", type=int, default=1, help="of each rank on a CPU; last bits depend on it (default: 1)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    environment = read_environment(os.environ)
    logging.basicConfig(format="%(message)s", level=logging.WARNING if environment.rank == 0 else logging.ERROR)
    device = find_device(args.device or rank_device(environment))
    if args.threads < 1:
        raise ConfigError(f"--threads {args.threads}: use 1 or more.")
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    files = [args.output / name for name in ("scores.json", "reconstructions.png")] if args.output else []
    for file in (*files, *([args.json] if args.json else [])):
        make_room(file)
    request = ReconstructionRequest(
        model=args.model,
        data=tuple(args.data),
        protocol=find_protocol(args.protocol),  # a file may bring a network of its own
        metrics=tuple(dict.fromkeys(name.strip() for name in args.metrics.split(",") if name.strip())),
        device=device,
        transform=args.transform,
        weights=parse_weights(args.feature_weights),
        perceptual_weights=args.perceptual_weights,
        depths=args.depths,
        shown=SHOWN if args.output else 0,
        count=args.count,
        batch_size=args.batch_size,
        step=args.step,
        model_weights=args.weights,
    )
    made = reconstruct(request, environment)
    if made is None:
        return
    result = to_result(made)
    print(to_table(result))
    if args.output:
        png = io.BytesIO()
        draw_sheet(made.measured).save(png, "PNG")
        write_atomically(args.output / "reconstructions.png", png.getvalue())
        write_result(args.output / "scores.json", result)
    if args.json:
        write_result(args.json, result)


if __name__ == "__main__":
    sys.exit(cli.run(main))
