"""Encode image shards with a trained RQ-VAE into code shards, once per data set."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megarq import cli
from megarq.data.files import expand_shards
from megarq.data.manifest import Manifest
from megarq.data.transforms import TRANSFORMS
from megarq.inference.pretrained import find_device, load_rqvae
from megarq.pretokenize.run import code_settings, pretokenize

EXAMPLE = """example:
  python tools/pretokenize.py --rqvae runs/rqvae --data 'shards/*.tar' --output codes --draws 8

Run the same command again after an interruption: finished shards are kept. The folder also gets a copy of the RQ-VAE.
--temperature is in units of squared distance between latents, so it means something only relative to their scale: the
perplexity printed at the end is the number of codes among which a draw effectively chooses. Near 1, draws equal the
argmin; near the codebook's size, they are noise."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rqvae", type=Path, required=True, help="run of train_rqvae.py, or folder of a model")
    parser.add_argument(
        "--data", nargs="+", required=True, help="webdataset tars of images: paths, globs, {0000..0099}, folders"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the code shards")
    parser.add_argument("--draws", type=int, default=8, help="drawn stacks beside the argmin stack (default 8)")
    parser.add_argument("--temperature", type=float, default=0.5, help="temperature of the draws (default 0.5)")
    parser.add_argument("--latents", action="store_true", help="store fp16 latents too, for exact soft targets")
    parser.add_argument(
        "--transform", default="center", choices=list(TRANSFORMS), help="from picture to square (default center)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="pictures in one pass of the encoder (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of draws and random transforms (default 0)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu ...; by default a GPU if there is one")
    parser.add_argument(
        "--max-bad-rate", type=float, default=0.01, help="share of unusable pictures accepted (default 0.01)"
    )
    return parser.parse_args(argv)


def report(manifest: Manifest, output: Path) -> str:
    """What was made, and what the temperature means for it."""
    settings = manifest.settings
    skipped = sum(shard.skipped for shard in manifest.shards)
    perplexities = ", ".join(f"{value:g}" for value in manifest.perplexity)
    return (
        f"{manifest.samples} samples in {len(manifest.shards)} shards in {output}, {skipped} pictures skipped\n"
        f"perplexity of Q at temperature {settings.temperature:g}, depth 1 to {settings.code_shape[2]}: {perplexities} "
        f"(of {', '.join(map(str, settings.codebook_sizes))} codes)"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    logging.basicConfig(format="%(message)s")
    sources = expand_shards(args.data)
    device = find_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rqvae = load_rqvae(args.rqvae, device)
    settings = code_settings(
        rqvae,
        draws=args.draws,
        temperature=args.temperature,
        latents=args.latents,
        transform=args.transform,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    manifest = pretokenize(rqvae, sources, args.output, settings, device=device, max_bad_rate=args.max_bad_rate)
    print(report(manifest, args.output))


if __name__ == "__main__":
    sys.exit(cli.run(main))
