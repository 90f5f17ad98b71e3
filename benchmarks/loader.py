"""Time the loader on one process: samples per second from code shards that this command makes.

Beside it, in the same run and by turns: a plain webdataset loop over the same tars, and one over tars that hold each
sample as members of its own. Every figure is the median of several passes; all files stand in the page cache.
"""

import argparse
import io
import json
import shlex
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from tqdm import tqdm

from megarq import cli
from megarq.config.ranges import COUNT, check_ranges
from megarq.data.code_shards import CodeShards
from megarq.data.code_writer import CodeBlock, write_shard
from megarq.data.loader import CodeLoader
from megarq.data.manifest import CodeSettings, Manifest
from megarq.data.mixture import Mixture
from megarq.engine.transformer_run import encode_caption
from megarq.files import write_atomically
from megarq.launch.machine import describe_machine
from megarq.text.tokenizer import TextTokenizer
from megarq.text.training import train_tokenizer

EXAMPLE = "example:\n  python benchmarks/loader.py --json benchmarks/results/loader.json"
SHARD, BLOCK, WORDS, LENGTH = 10_000, 1024, 20_000, 64
Pass = Callable[[], int]
"""Goes over data once and returns how many samples it saw."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=200_000, help="samples in the code shards (default 200000)")
    parser.add_argument("--latents", type=int, default=10_000, help="samples in those with latents (default 10000)")
    parser.add_argument("--members", type=int, default=20_000, help="samples with members of their own (default 20000)")
    parser.add_argument("--batch", type=int, default=2048, help="samples in a batch (default 2048)")
    parser.add_argument("--repeats", type=int, default=5, help="passes of which the median counts (default 5)")
    parser.add_argument("--folder", type=Path, help="where the shards are made; default: the temporary folder")
    parser.add_argument("--json", metavar="OUT", help="write the result to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    check_ranges("benchmark", args, **dict.fromkeys(("samples", "latents", "members", "batch", "repeats"), COUNT))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        passes = make_passes(Path(folder), args)
        seconds: dict[str, list[float]] = {name: [] for name in passes}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in passes}
        samples = {}
        for _ in tqdm(range(args.repeats), "passes over every variant", disable=None):
            for name, go in passes.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                samples[name] = go()
                seconds[name].append(time.perf_counter() - start)
                cpu_seconds[name].append(time.process_time() - cpu_start)
    rates = {name: sorted(round(samples[name] / taken) for taken in seconds[name]) for name in passes}
    median = {name: round(statistics.median(rate)) for name, rate in rates.items()}
    busy = {name: round(samples[name] / statistics.median(taken)) for name, taken in cpu_seconds.items()}
    result = {
        "machine": describe_machine(),
        "command": f"python benchmarks/loader.py {shlex.join(sys.argv[1:])}".strip(),
        "batch": args.batch,
        "code_shape": [8, 8, 4],
        "samples_per_second": median,
        "samples_per_cpu_second": {name: rate for name, rate in busy.items() if "workers" not in name},
        "all_passes": rates,
        "times_one_sample_per_member": round(median["classes"] / median["webdataset, one sample per member"], 1),
    }
    print(json.dumps(result, indent=2))
    if args.json:
        write_atomically(Path(args.json), json.dumps(result, indent=2) + "\n")


def make_passes(folder: Path, args: argparse.Namespace) -> dict[str, Pass]:
    """What is timed, by name; all data are made first."""
    blocks = Mixture([make_codes(folder / "codes", args.samples)])
    latents = Mixture([make_codes(folder / "latents", args.latents, latents=True)])
    members = make_members(folder / "members.tar", args.members)
    tokenizer, _ = train_tokenizer(captions(np.random.default_rng(0), 20_000), 16_384, folder / "tokenizer.json")
    classes: dict[str, Any] = {"condition": "class", "cond_length": 1, "caption_encoder": None}
    text = partial(text_options, tokenizer)
    urls = [str(path) for path in sorted((folder / "codes").glob("*.tar"))]
    over = partial(over_loader, batch=args.batch)
    return {
        "classes": partial(over, blocks, **classes),
        "webdataset, blocks": partial(over_webdataset, urls),
        "webdataset, one sample per member": partial(over_webdataset, [members]),
        "classes, 2 workers": partial(over, blocks, workers=2, **classes),
        "captions": partial(over, blocks, **text(0.0)),
        "captions, BPE dropout 0.1": partial(over, blocks, **text(0.1)),
        "captions, BPE dropout 0.1, 2 workers": partial(over, blocks, workers=2, **text(0.1)),
        "latents": partial(over, latents, targets="soft", **classes),
        "latents, 2 workers": partial(over, latents, targets="soft", workers=2, **classes),
    }


def text_options(tokenizer: TextTokenizer, dropout: float) -> dict[str, Any]:
    """Of a loader with captions of 64 tokens."""
    encode = partial(encode_caption, tokenizer, LENGTH, dropout)
    return {"condition": "text", "cond_length": LENGTH, "caption_encoder": encode}


def over_loader(data: Mixture, *, batch: int, **options: Any) -> int:
    """An epoch of a loader that is new: workers, files and windows are part of the time."""
    loader = CodeLoader(data, global_batch_size=batch, **options)
    return sum(len(made.codes) for made in islice(loader, -(-data.samples // batch)))


def over_webdataset(urls: Sequence[str]) -> int:
    """A pass of webdataset, with decoding and nothing else."""
    return sum(
        len(sample["codes.npy"]) if sample["codes.npy"].ndim == 4 else 1
        for sample in webdataset.WebDataset(list(urls), shardshuffle=False).decode()
    )


def make_codes(folder: Path, samples: int, *, latents: bool = False) -> CodeShards:
    """Code shards of random 8x8x4 codes with eight draws, captions and classes."""
    folder.mkdir()
    settings = CodeSettings(
        code_shape=(8, 8, 4),
        codebook_sizes=(16_384,) * 4,
        draws=8,
        temperature=0.5,
        latent_shape=(8, 8, 256) if latents else None,
        fingerprint="0" * 64,
        transform="center",
        resolution=256,
        seed=0,
        batch_size=64,
        block_size=BLOCK,
    )
    firsts = range(0, samples, SHARD)
    records = [
        write_shard(
            folder, index, settings, f"{index:05d}.tar", code_blocks(first, min(first + SHARD, samples), settings)
        )
        for index, first in enumerate(tqdm(firsts, f"making {samples:,} samples", disable=None))
    ]
    Manifest(settings, tuple(records)).save(folder)
    return CodeShards.open(folder)


def code_blocks(first: int, end: int, settings: CodeSettings) -> Iterator[CodeBlock]:
    """Random blocks of samples first .. end - 1."""
    random = np.random.default_rng(first)
    for start in range(first, end, settings.block_size):
        count = min(settings.block_size, end - start)
        stacks = random.integers(0, 16_384, (9, count, *settings.code_shape), dtype=np.uint16)
        latents = None
        if settings.latent_shape:
            latents = random.standard_normal((count, *settings.latent_shape), np.float32).astype(np.float16)
        keys = [f"{number:09d}" for number in range(start, start + count)]
        texts = [[caption] for caption in captions(random, count)]
        yield CodeBlock(stacks[0], stacks[1:], latents, keys, texts, random.integers(0, 1000, count).tolist())


def captions(random: np.random.Generator, count: int) -> Iterator[str]:
    """Captions of 6 to 14 made-up words; the n-th commonest of 20,000 words is drawn as often as 1 / n says."""
    spelling = np.random.default_rng(1)
    letters = spelling.choice(list("etaoinshrdlcumwfgypbvk"), (WORDS, 9))
    words = ["".join(word[:length]) for word, length in zip(letters, spelling.integers(2, 10, WORDS), strict=True)]
    frequency = 1 / np.arange(1, WORDS + 1)
    drawn = random.choice(words, (count, 14), p=frequency / frequency.sum())
    return (" ".join(row[:length]) for row, length in zip(drawn, random.integers(6, 15, count), strict=True))


def make_members(file: Path, samples: int) -> str:
    """A tar in which every sample has its own members: codes of one stack, a caption and a class."""
    random = np.random.default_rng(0)
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, caption in enumerate(captions(random, samples)):
            buffer = io.BytesIO()
            np.save(buffer, random.integers(0, 16_384, (8, 8, 4), dtype=np.uint16))
            for name, data in (("codes.npy", buffer.getvalue()), ("txt", caption.encode()), ("cls", b"7")):
                info = tarfile.TarInfo(f"{number:09d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(file)


if __name__ == "__main__":
    sys.exit(cli.run(main))
