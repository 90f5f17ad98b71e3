"""Draw pictures from an exported model into one PNG, whose text chunks tell how they were drawn."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin
from tqdm import tqdm

from megarq import cli
from megarq.data.picture_set import Item
from megarq.errors import ConfigError
from megarq.files import write_atomically
from megarq.inference.drawing import Rank, chosen_sampling
from megarq.inference.export import DTYPES
from megarq.inference.generator import ImageGenerator
from megarq.inference.options import add_sampling_options
from megarq.inference.pretrained import find_device
from megarq.scoring.rankers import ClassRanker, ClipRanker

EXAMPLE = (
    'example: python tools/sample.py models/cc3m --prompt "a lighthouse at night" --count 16 --top-k 1024 --top-p 0.95 '
    "--seed 1 --output grid.png"
)
PAD = 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    arguments.add_argument("folder", metavar="FOLDER", help="an exported model")
    arguments.add_argument("--prompt", action="append", dest="prompts", help="a caption; may be repeated")
    arguments.add_argument("--class", action="append", type=int, dest="classes", help="a class; may be repeated")
    arguments.add_argument("--count", type=int, default=1, help="pictures of each prompt or class (default: 1)")
    add_sampling_options(arguments)
    arguments.add_argument("--output", default="grid.png", help="PNG to write (default: grid.png)")
    arguments.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, .. (default: cpu)")
    arguments.add_argument(
        "--keep-best", type=int, metavar="N", help="of the pictures of each prompt or class show the N best, best first"
    )
    arguments.add_argument(
        "--ranker-weights",
        type=Path,
        metavar="FILE",
        help="with --keep-best: CLIP's weights (prompts), or a ResNet-101's (classes); default: those in torch's cache",
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


def keep_best(
    pictures: Sequence[Image.Image], items: Sequence[Item], rank: Rank, count: int
) -> tuple[list[Image.Image], list[float]]:
    """The `count` best pictures of each item, best first, and their scores; of equal ones the first drawn."""
    best: list[tuple[Image.Image, float]] = []
    each = len(pictures) // len(items)
    for place, item in enumerate(items):
        drawn = pictures[place * each : (place + 1) * each]
        scored = zip(drawn, map(float, rank(drawn, [item] * each)), strict=True)
        best += sorted(scored, key=lambda pair: -pair[1])[:count]
    return [picture for picture, _ in best], [score for _, score in best]


def find_ranker(options: argparse.Namespace, generator: ImageGenerator) -> Rank:
    """CLIP for prompts, a classifier of the model's classes for classes."""
    device = find_device(options.device)
    if options.prompts:
        return ClipRanker(options.ranker_weights, device)
    generator.conditions(classes=options.classes)  # a model of something else has no classes to compare
    return ClassRanker(options.ranker_weights, device, generator.transformer.config.cond_vocab_size)


def check_keeping(options: argparse.Namespace) -> None:
    """Raise ConfigError where --keep-best cannot be followed."""
    if options.keep_best is None:
        if options.ranker_weights is not None:
            raise ConfigError("--ranker-weights without --keep-best: nothing is ranked. Give --keep-best N.")
        return
    if not 1 <= options.keep_best <= options.count:
        raise ConfigError(f"--keep-best {options.keep_best} of --count {options.count}: give 1 to {options.count}.")
    if not options.prompts and not options.classes:
        raise ConfigError(
            f"--keep-best {options.keep_best} without --prompt or --class: nothing to rank by. Leave it out."
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parser().parse_args(argv)
    if Path(options.output).suffix.lower() != ".png":
        raise ConfigError(f"--output {options.output}: give a name that ends in .png.")
    if options.batch_size < 1 or options.count < 1:
        raise ConfigError(f"--count {options.count}, --batch-size {options.batch_size}: give 1 or more for each.")
    check_keeping(options)
    generator = ImageGenerator.from_pretrained(
        options.folder, options.device, DTYPES[options.dtype], options.batch_size
    )
    rank = None if options.keep_best is None else find_ranker(options, generator)
    asked = options.prompts or options.classes or [None]
    settings = chosen_sampling(generator.info, vars(options)) | {"seed": options.seed}
    with tqdm(total=len(asked) * options.count * generator.positions, unit="stack", desc="sampling", delay=0.2) as bar:
        pictures = generator.generate(options.prompts, options.classes, options.count, **settings, progress=bar.update)
    shown, scores = options.count, None
    if rank is not None:
        items = [Item(prompt) for prompt in options.prompts or ()] or [Item(label=label) for label in options.classes]
        pictures, scores = keep_best(pictures, items, rank, options.keep_best)
        shown = options.keep_best
    columns = shown if len(asked) > 1 else math.ceil(math.sqrt(shown))
    facts = {"prompts": options.prompts, "classes": options.classes, "count": options.count, **settings}
    facts |= {"keep_best": options.keep_best, "scores": scores}
    write_png(
        Path(options.output),
        grid(pictures, columns),
        {"Software": "MegaRQ", **{key: value for key, value in facts.items() if value is not None}},
    )
    print(f"{options.output}: {len(pictures)} pictures, {json.dumps(settings)}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
