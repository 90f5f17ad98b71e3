"""Draw pictures from an exported model into one PNG, whose text chunks tell how they were drawn."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin
from tqdm import tqdm

from megarq import cli
from megarq.errors import ConfigError
from megarq.files import write_atomically
from megarq.inference.export import DTYPES
from megarq.inference.generator import BATCH, ImageGenerator

EXAMPLE = (
    'example: python tools/sample.py models/cc3m --prompt "a lighthouse at night" --count 16 --top-k 1024 --top-p 0.95 '
    "--seed 1 --output grid.png"
)
PAD = 2


def per_depth(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of one value, or of comma-separated values, one for each depth."""

    def parse(text: str) -> Any:
        values = [convert(part) for part in text.split(",")]
        return values[0] if len(values) == 1 else values

    parse.__name__ = f"{convert.__name__}[,{convert.__name__}..]"
    return parse


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    arguments.add_argument("folder", metavar="FOLDER", help="an exported model")
    arguments.add_argument("--prompt", action="append", dest="prompts", help="a caption; may be repeated")
    arguments.add_argument("--class", action="append", type=int, dest="classes", help="a class; may be repeated")
    arguments.add_argument("--count", type=int, default=1, help="pictures of each prompt or class (default: 1)")
    arguments.add_argument(
        "--top-k",
        type=per_depth(int),
        help="draw among the K likeliest codes; A,B,.. for each depth (default: the model's)",
    )
    arguments.add_argument(
        "--top-p",
        type=per_depth(float),
        help="draw among codes that hold this share of the probability; A,B,.. likewise",
    )
    arguments.add_argument("--temperature", type=per_depth(float), help="divides the logits; A,B,.. likewise")
    arguments.add_argument("--seed", type=int, default=0, help="same seed, same pictures (default: 0)")
    arguments.add_argument("--output", default="grid.png", help="PNG to write (default: grid.png)")
    arguments.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, .. (default: cpu)")
    arguments.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the RQ-Transformer (default: fp32)")
    arguments.add_argument(
        "--batch-size", type=int, default=BATCH, help="pictures drawn at once (default: %(default)s)"
    )
    return arguments


def grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures in rows of `columns`, PAD pixels apart."""
    width, height = pictures[0].size
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new(pictures[0].mode, (columns * (width + PAD) + PAD, rows * (height + PAD) + PAD))
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet.paste(picture, (PAD + column * (width + PAD), PAD + row * (height + PAD)))
    return sheet


def write_png(path: Path, picture: Image.Image, facts: dict[str, Any]) -> None:
    """Write a PNG with one text chunk for each fact."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in facts.items():
        chunks.add_itxt(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    content = BytesIO()
    picture.save(content, "PNG", pnginfo=chunks)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parser().parse_args(argv)
    if Path(options.output).suffix.lower() != ".png":
        raise ConfigError(f"--output {options.output}: give a name that ends in .png.")
    if options.batch_size < 1 or options.count < 1:
        raise ConfigError(f"--count {options.count}, --batch-size {options.batch_size}: give 1 or more for each.")
    generator = ImageGenerator.from_pretrained(
        options.folder, options.device, DTYPES[options.dtype], options.batch_size
    )
    asked = options.prompts or options.classes or [None]
    settings = {
        "temperature": generator.sampling.temperature if options.temperature is None else options.temperature,
        "top_k": generator.sampling.top_k if options.top_k is None else options.top_k,
        "top_p": generator.sampling.top_p if options.top_p is None else options.top_p,
        "seed": options.seed,
    }
    with tqdm(total=len(asked) * options.count * generator.positions, unit="stack", desc="sampling", delay=0.2) as bar:
        pictures = generator.generate(options.prompts, options.classes, options.count, **settings, progress=bar.update)
    columns = options.count if len(asked) > 1 else math.ceil(math.sqrt(options.count))
    facts = {"prompts": options.prompts, "classes": options.classes, "count": options.count, **settings}
    write_png(
        Path(options.output),
        grid(pictures, columns),
        {"Software": "MegaRQ", **{key: value for key, value in facts.items() if value is not None}},
    )
    print(f"{options.output}: {len(pictures)} pictures, {json.dumps(settings)}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
