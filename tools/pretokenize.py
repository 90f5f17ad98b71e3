"""Encode image shards with a trained RQ-VAE into code shards, once per data set."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megarq import cli
from megarq.data.faults import Fault
from megarq.data.files import expand_shards
from megarq.data.manifest import Manifest
from megarq.data.transforms import TRANSFORMS
from megarq.errors import ConfigError
from megarq.inference.pretrained import find_device, load_rqvae
from megarq.launch.process_group import rank_device
from megarq.pretokenize.crew import Crew, find_crew
from megarq.pretokenize.encoder import PRECISIONS
from megarq.pretokenize.run import code_settings, pretokenize

EXAMPLE = """examples:
  python tools/pretokenize.py --rqvae runs/rqvae --data 'shards/*.tar' --output codes --draws 8
  mpirun -n 8 python tools/pretokenize.py ...      or srun, or a job array: workers share the shards out by locks

Run the same command again after an interruption: finished shards are kept. The folder also gets a copy of the RQ-VAE.
Its bytes do not depend on the number of ranks and workers.
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
        "--data",
        nargs="+",
        required=True,
        help="webdataset tars of images, such as img2dataset's: paths, globs, {0000..0099}, folders, pipe:, URLs",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the code shards")
    parser.add_argument("--draws", type=int, default=8, help="drawn stacks beside the argmin stack (default 8)")
    parser.add_argument("--temperature", type=float, default=0.5, help="temperature of the draws (default 0.5)")
    parser.add_argument("--latents", action="store_true", help="store fp16 latents too, for exact soft targets")
    parser.add_argument(
        "--transform", default="center", choices=list(TRANSFORMS), help="from picture to square (default center)"
    )
    parser.add_argument("--caption-field", metavar="NAME", help="field of a picture's .json that holds its captions")
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=list(PRECISIONS),
        help="of the encoder's convolutions (default fp32); distances are fp32 in each",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the encoder with torch.compile; benchmarks/pretokenize.py tells whether it pays",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="pictures in one pass of the encoder (default 64)")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of the encoder on a CPU; the bytes depend on it (default 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of draws and random transforms (default 0)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu ...; by default a GPU if there is one")
    parser.add_argument(
        "--workers",
        type=int,
        help="processes that decode pictures; 0 for none (default: the cores of this rank, 16 at most; 0 on a CPU)",
    )
    parser.add_argument(
        "--max-bad-rate", type=float, default=0.01, help="share of unusable pictures accepted (default 0.01)"
    )
    return parser.parse_args(argv)


def decoding_workers(device: torch.device, crew: Crew) -> int:
    """Processes that keep an encoder on this device busy: a CPU has no core to spare for them."""
    cores = min(len(os.sched_getaffinity(0)), (os.cpu_count() or 1) // crew.here)  # ranks bound to cores, or not
    return 0 if device.type == "cpu" else min(max(cores, 1), 16)


def report(manifest: Manifest, output: Path) -> str:
    """What was made, and what the temperature means for it."""
    settings = manifest.settings
    skipped = sum(shard.skipped for shard in manifest.shards)
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(manifest.faults.items()))
    torn = "".join(
        f"\ntorn, used as far as it goes: {shard.source}"
        for shard in manifest.shards
        if Fault.TRUNCATED in shard.faults
    )
    perplexities = ", ".join(f"{value:g}" for value in manifest.perplexity)
    return (
        f"{manifest.samples} samples in {len(manifest.shards)} shards in {output}, {skipped} pictures skipped"
        f"{f' ({faults})' if faults else ''}"
        f"{torn}\n"
        f"perplexity of Q at temperature {settings.temperature:g}, depth 1 to {settings.code_shape[2]}: {perplexities} "
        f"(of {', '.join(map(str, settings.codebook_sizes))} codes)"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    logging.basicConfig(format="%(message)s")
    crew = find_crew(os.environ)
    with crew.failing_together():
        sources = expand_shards(args.data)
        device = find_device(args.device or rank_device(crew.environment))
        rqvae = load_rqvae(args.rqvae, device)
        threads = args.threads if device.type == "cpu" else 0
        if device.type == "cpu" and threads < 1:
            raise ConfigError(f"--threads {threads}: use 1 or more, and as many as before to go on with a folder.")
        settings = code_settings(
            rqvae,
            draws=args.draws,
            temperature=args.temperature,
            latents=args.latents,
            transform=args.transform,
            seed=args.seed,
            batch_size=args.batch_size,
            precision=args.precision,
            compiled=args.compile,
            caption_field=args.caption_field,
            threads=threads,
        )
        if threads:
            torch.set_num_threads(threads)
    workers = decoding_workers(device, crew) if args.workers is None else args.workers
    manifest = pretokenize(
        *(rqvae, sources, args.output, settings),
        device=device,
        max_bad_rate=args.max_bad_rate,
        workers=workers,
        crew=crew,
    )
    if manifest is not None:
        print(report(manifest, args.output))
    elif crew.ends:
        print(f"nothing left to begin in {args.output}: other workers hold the rest, and the last of them completes it")


if __name__ == "__main__":
    sys.exit(cli.run(main))
