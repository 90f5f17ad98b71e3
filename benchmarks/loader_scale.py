"""Load from a folder of 30 million samples: memory, time to the first batch and to resume, open files, bytes read.

The manifest is that of 3,000 shards of 10,000 samples (8x8x4 codes, 8 draws, a caption each). The shards themselves are
synthetic: 3,000 hard links to one real tar, so that every read and every open file is real, and comes from the page
cache. Each rank is a new process without workers; captions are read and chosen, but not tokenized.
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
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megarq import cli
from megarq.data.code_shards import CodeShards
from megarq.data.loader import CodeLoader
from megarq.data.manifest import Manifest
from megarq.data.mixture import Mixture
from megarq.data.order import LoaderState
from megarq.files import write_atomically
from megarq.launch.machine import describe_machine

EXAMPLE = "example:\n  python benchmarks/loader_scale.py --json benchmarks/results/loader-scale.json"
SHARDS, SAMPLES = 3000, 10_000
MIB = 2**20


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 64, 512], help="data-parallel sizes (1 64 512)")
    parser.add_argument("--batch", type=int, default=2048, help="samples in a global batch (default 2048)")
    parser.add_argument("--steps", type=int, default=512, help="steps over which bytes are counted (default 512)")
    parser.add_argument("--folder", type=Path, help="where the data are made; default: the temporary folder")
    parser.add_argument("--json", metavar="OUT", help="write the result to this file")
    parser.add_argument("--one-rank", nargs=3, metavar=("CODES", "RANK", "POSITION"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    if args.one_rank:
        codes, rank, position = args.one_rank
        print(json.dumps(one_rank(Path(codes), int(rank), args.ranks[0], int(position), args)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        codes = make_folder(Path(folder))
        runs = [(ranks, rank) for ranks in args.ranks for rank in sorted({0, ranks // 3, ranks - 1})]
        half = SHARDS * SAMPLES // 2 + 12_345
        measured: dict[int, list[dict[str, Any]]] = {ranks: [] for ranks in args.ranks}
        for ranks, rank in tqdm(runs, "ranks", disable=None):
            start, resumed = (in_new_process(codes, ranks, rank, position, args) for position in (0, half))
            measured[ranks].append({"rank": rank, "start": start, "resumed_in_mid_epoch": resumed})
    whole = measured[args.ranks[0]][0]["start"]["bytes_read"] * args.ranks[0]
    result = {
        "machine": describe_machine(),
        "command": f"python benchmarks/loader_scale.py {shlex.join(sys.argv[1:])}".strip(),
        "samples": SHARDS * SAMPLES,
        "data": f"manifest of {SHARDS} shards; the shards are hard links to one",
        "batch": args.batch,
        "steps": args.steps,
        "bytes_read_by_all": f"{args.ranks[0]} x the bytes of rank 0 of {args.ranks[0]}, to which shares are relative",
        "ranks": {
            ranks: {
                "largest_share_of_bytes_times_ranks": round(
                    max(run["start"]["bytes_read"] for run in runs_of) * ranks / whole, 3
                ),
                "sampled": runs_of,
            }
            for ranks, runs_of in measured.items()
        },
    }
    print(json.dumps(result, indent=2))
    if args.json:
        write_atomically(Path(args.json), json.dumps(result, indent=2) + "\n")


def make_folder(folder: Path) -> Path:
    """3,000 names of one shard, and the manifest that describes them."""
    from loader import make_codes

    one = make_codes(folder / "one", SAMPLES)
    record = one.manifest.shards[0]
    codes = folder / "codes"
    codes.mkdir()
    records = [replace(record, file=f"{number:06d}.tar", source=f"{number:05d}.tar") for number in range(SHARDS)]
    for shard in records:
        os.link(one.folder / record.file, codes / shard.file)
    Manifest(one.settings, tuple(records)).save(codes)
    return codes


def in_new_process(codes: Path, ranks: int, rank: int, position: int, args: argparse.Namespace) -> dict[str, Any]:
    """What one rank measures of itself."""
    command = [sys.executable, __file__, "--one-rank", str(codes), str(rank), str(position), "--ranks", str(ranks)]
    command += ["--batch", str(args.batch), "--steps", str(args.steps)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(answer.stdout))


def one_rank(codes: Path, rank: int, ranks: int, position: int, args: argparse.Namespace) -> dict[str, Any]:
    """Open the folder, take the first batch, then go on for the rest of the steps."""
    torch.set_num_threads(1)
    before, start = peak_mib(), time.perf_counter()
    data = Mixture([CodeShards.open(codes)])
    opened, read = time.perf_counter() - start, bytes_read()
    loader = CodeLoader(
        data,
        condition="text",
        cond_length=64,
        caption_encoder=lambda caption, seed: [0] * 64,
        global_batch_size=args.batch,
        rank=rank,
        world_size=ranks,
        start=LoaderState.at(position, data.samples),
    )
    batches = iter(loader)
    next(batches)
    first = time.perf_counter() - start
    at_first, private_at_first = peak_mib(), peak_mib(private=True)
    samples = sum(len(batch.codes) for batch in islice(batches, args.steps - 1)) + args.batch // ranks
    return {
        "seconds_to_open": round(opened, 2),
        "seconds_to_first_batch": round(first, 2),
        "peak_mib_before": before,
        "peak_mib_at_first_batch": at_first,
        "peak_private_mib_at_first_batch": private_at_first,
        "peak_mib_at_end": peak_mib(),
        "samples": samples,
        "bytes_read": bytes_read() - read,
        "codes_bytes_needed": samples * 512,
        "open_shards": open_shards(),
    }


def open_shards() -> int:
    """Tars that this process has open."""
    with os.scandir("/proc/self/fd") as files:
        return sum(Path(file.path).resolve().suffix == ".tar" for file in files)


def peak_mib(private: bool = False) -> int:
    """The most memory that this process ever had (getrusage's would be its parent's).

    private: without the pages of files, torch's libraries above all, which the processes of a machine share.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kib = int(status["VmHWM"].split()[0]) - private * int(status["RssFile"].split()[0])
    return kib * 1024 // MIB


def bytes_read() -> int:
    """Bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


if __name__ == "__main__":
    sys.exit(cli.run(main))
