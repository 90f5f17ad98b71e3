"""How fast pictures become codes: decoding alone, encoding alone, and the whole, in turns within one run.

Efficiency is what the whole makes of its parts. On a CPU they share the cores, so that at best their times add up:
whole * (1/decode + 1/encode). On a GPU they run side by side, so that at best the slower one decides: whole / slowest.
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
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megarq import cli
from megarq.config.load import load_config
from megarq.config.run import RQVAERunConfig
from megarq.data.faults import Faults
from megarq.data.files import expand_shards
from megarq.data.manifest import CodeSettings
from megarq.data.transforms import TRANSFORMS
from megarq.errors import ConfigError
from megarq.files import write_atomically
from megarq.inference.pretrained import find_device, load_rqvae
from megarq.launch.machine import describe_machine
from megarq.pretokenize.decoder import Batch, Decoder
from megarq.pretokenize.encoder import PRECISIONS, BlockEncoder
from megarq.pretokenize.run import code_settings, make_shard
from megarq.pretokenize.work import Work
from megarq.rqvae.model import RQVAE

EXAMPLE = """examples:
  python benchmarks/pretokenize.py --rqvae runs/demo/rqvae --data 'runs/demo/shards/*.tar' --transform none
  python benchmarks/pretokenize.py --model rqvae-8x8x4 --images 64 --batch-size 8 --json OUT   random weights"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--rqvae", type=Path, help="run of train_rqvae.py, or folder of a model")
    which.add_argument("--model", help="a configuration by name or path; its weights are random")
    parser.add_argument("--data", nargs="+", help="image shards (default: JPEGs of noise on gradients, made up)")
    parser.add_argument("--images", type=int, default=1024, help="made-up pictures, in two shards (default 1024)")
    parser.add_argument("--size", type=int, help="their width; the height is 3/4 of it (default twice the resolution)")
    parser.add_argument("--transform", default="center", choices=list(TRANSFORMS))
    parser.add_argument("--precision", default="fp32", choices=list(PRECISIONS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--latents", action="store_true")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of the encoder on a CPU (default 1)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each, of which the median counts (default 3)")
    parser.add_argument(
        "--agreement", type=int, default=256, help="pictures encoded in bf16 and fp16 too, slow on a CPU (default 256)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="OUT", help="write the result to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    if min(args.images, args.repeats, args.agreement) < 1 or args.images % 2:
        raise ConfigError(
            f"--images {args.images} --repeats {args.repeats} --agreement {args.agreement}: give 1 or more of each, "
            "and an even number of images."
        )
    torch.set_num_threads(args.threads)
    device = find_device(args.device)
    rqvae = (load_rqvae(args.rqvae, device) if args.rqvae else random_rqvae(args.model).to(device)).eval()
    settings = code_settings(
        rqvae,
        draws=args.draws,
        latents=args.latents,
        transform=args.transform,
        batch_size=args.batch_size,
        precision=args.precision,
        compiled=args.compile,
    )
    with tempfile.TemporaryDirectory() as folder:
        size = args.size or 2 * settings.resolution
        sources = expand_shards(args.data) if args.data else made_up_shards(Path(folder), args.images, size)
        result = measure(rqvae, settings, sources, device, args)
    result = {
        "machine": describe_machine(),
        "command": f"python benchmarks/pretokenize.py {shlex.join(sys.argv[1:])}".strip(),
        "model": str(args.rqvae or args.model),
        "weights": "trained" if args.rqvae else "random",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        **result,
    }
    print(json.dumps(result, indent=2))
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=2) + "\n")


def random_rqvae(model: str) -> RQVAE:
    """An untrained RQ-VAE whose codebook has the scale of its latents, so that codes are as varied as trained ones'."""
    config = load_config(model, [], "rq-vae")
    assert isinstance(config, RQVAERunConfig)
    torch.manual_seed(0)
    rqvae = RQVAE(config.model)
    with torch.no_grad():
        pictures = torch.rand(1, 3, config.model.resolution, config.model.resolution) * 2 - 1
        scale = rqvae.encode(pictures).std() / rqvae.quantizer.codebook(0).vectors.std()
        for book in {rqvae.quantizer.codebook(depth) for depth in range(config.model.depth)}:
            book.weight.mul_(scale)
    return rqvae


def made_up_shards(folder: Path, images: int, width: int) -> list[str]:
    """Two tars of captioned JPEGs that compress about as photographs do."""
    random, height = np.random.default_rng(0), width * 3 // 4
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(images // 2):
                coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
                smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
                noisy = np.asarray(smooth, np.int16) + random.integers(-12, 13, (height, width, 3), np.int16)
                jpeg = io.BytesIO()
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(jpeg, "JPEG", quality=90)
                for extension, data in (("jpg", jpeg.getvalue()), ("txt", b"a made-up picture")):
                    info = tarfile.TarInfo(f"{shard}{number:06d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return sorted(str(path) for path in folder.glob("*.tar"))


def measure(
    rqvae: RQVAE, settings: CodeSettings, sources: Sequence[str], device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    """Images per second of the parts and the whole, by turns; and how far other precisions agree."""
    encoder = BlockEncoder(rqvae, settings, device)
    with Decoder(settings, args.workers) as decoder:
        ready = list(chain.from_iterable(decoder.batches(source, Faults()) for source in sources))
        images = sum(len(batch.samples) for batch in ready)
        list(encoder.blocks(ready[:1], []))  # whatever the first batch alone must wait for
        seconds: dict[str, list[float]] = {"decode": [], "encode": [], "whole": []}
        for _ in range(args.repeats):
            seconds["decode"].append(timed(lambda: [decode_all(decoder, source) for source in sources]))
            seconds["encode"].append(timed(lambda: list(encoder.blocks(ready, []))))
            with tempfile.TemporaryDirectory() as output:
                work = Work(Path(output), settings, sources)
                seconds["whole"].append(timed(lambda work=work: fill(decoder, encoder, work)))  # type: ignore[misc]
    speed = {name: images / statistics.median(each) for name, each in seconds.items()}
    few = ready[: -(-args.agreement // settings.batch_size)]
    turns = zip(*seconds.values(), strict=True)
    # What the parts alone take, one after the other on a CPU, whose cores they share, else beside each other.
    least = [decode + encode if device.type == "cpu" else max(decode, encode) for decode, encode, _ in turns]
    efficiencies = [part / whole for part, whole in zip(least, seconds["whole"], strict=True)]
    return {
        "images": images,
        "images_per_second": {name: round(each, 3) for name, each in speed.items()},
        "efficiency": round(statistics.median(efficiencies), 3),
        "efficiency_of_each_turn": [round(each, 3) for each in efficiencies],
        "share_of_decoding": round(speed["encode"] / (speed["decode"] + speed["encode"]), 4),
        "seconds": {name: [round(each, 3) for each in all_] for name, all_ in seconds.items()},
        "agreement_pictures": sum(len(batch.samples) for batch in few),
        "agreement_with_fp32": {
            precision: agreement(rqvae, settings, few, device, precision) for precision in ("bf16", "fp16")
        },
    }


def decode_all(decoder: Decoder, source: str) -> None:
    """Read, decode and transform a shard."""
    for _ in decoder.batches(source, Faults()):
        pass


def fill(decoder: Decoder, encoder: BlockEncoder, work: Work) -> None:
    """All shards of a folder."""
    faults = Faults()
    for index in range(len(work.sources)):
        make_shard(decoder, encoder, work, index, faults, lambda: None)


def timed(run: Any) -> float:
    """Seconds that a call takes; it leaves nothing running on the device."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def agreement(
    rqvae: RQVAE, settings: CodeSettings, batches: Sequence[Batch], device: torch.device, precision: str
) -> list[float]:
    """Share of equal argmin codes, per depth: this precision beside fp32."""
    codes = []
    for name in ("fp32", precision):
        encoder = BlockEncoder(rqvae, replace(settings, precision=name, compiled=False), device)
        stacks = [rqvae.quantize(encoder.encode(batch.pictures)) for batch in batches]
        codes.append(torch.cat(stacks).cpu())
    return [round(share, 5) for share in (codes[0] == codes[1]).double().mean((0, 1, 2)).tolist()]


if __name__ == "__main__":
    sys.exit(cli.run(main))
