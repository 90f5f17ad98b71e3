"""Draw pictures from an exported model: into one PNG, whose text chunks tell how they were drawn, or for a file of many
prompts into a folder, together with whoever else draws into it."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from megarq import cli
from megarq.data.picture_items import prompt_items
from megarq.data.picture_set import MOST_PICTURES, Item
from megarq.errors import ConfigError
from megarq.files import make_room
from megarq.inference.drawing import PICTURES_PER_TAR, Rank, chosen_sampling
from megarq.inference.drawing_command import asked_device, asked_model, draw_items, loaded, warn_on_rank_zero
from megarq.inference.generator import ImageGenerator
from megarq.inference.options import add_sampling_options
from megarq.inference.png import write_png
from megarq.scoring.rankers import ClassRanker, ClipRanker

EXAMPLE = """examples:
  python tools/sample.py models/cc3m --prompt "a lighthouse at night" --count 16 --top-p 0.95 --output grid.png
  python tools/sample.py models/cc3m --prompts-file prompts.txt --count 4 --output pictures

Of --prompts-file, the same command again after an interruption draws what is missing; a second one, started anywhere,
shares the work, and so do the ranks of torchrun, deepspeed, srun and mpirun. The pictures are the same."""
PAD = 2
MOST_IN_GRID = 10_000
MOST = {"png": 100_000, "tar": MOST_PICTURES}
"""Pictures of a folder, by format."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("model", type=Path, metavar="FOLDER", help="an exported model")
    arguments.add_argument("--prompt", action="append", dest="prompts", help="a caption; may be repeated")
    arguments.add_argument("--class", action="append", type=int, dest="classes", help="a class; may be repeated")
    arguments.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="a caption a line, in UTF-8: draw all of them into a folder",
    )
    arguments.add_argument("--count", type=int, default=1, help="pictures of each prompt or class (default: 1)")
    add_sampling_options(arguments)
    arguments.add_argument(
        "--output", type=Path, help="PNG to write (default: grid.png), or for --prompts-file the folder"
    )
    arguments.add_argument(
        "--format", choices=MOST, help="of --prompts-file: a PNG and a JSON for each picture (default), or tars of them"
    )
    arguments.add_argument("--device", help="cpu, cuda, cuda:1, ..; by default this rank's GPU if there is one")
    arguments.add_argument(
        "--threads", type=int, help="of --prompts-file on a CPU, of each rank; bits depend on it (default: 1)"
    )
    arguments.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
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
    device = asked_device(options.device)
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


def draw_many(options: argparse.Namespace) -> None:
    """Draw the pictures of a file of prompts into a folder."""
    given = {"--prompt": options.prompts, "--class": options.classes, "--keep-best": options.keep_best}
    given |= {"--ranker-weights": options.ranker_weights}
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"--prompts-file {options.prompts_file} and {name} are both given: give one or the other."
            )
    if options.output is None or options.output.suffix.lower() == ".png":
        raise ConfigError(f"--prompts-file makes a folder, and --output is {options.output}. Give --output DIR.")
    warn_on_rank_zero()
    info = asked_model(options.model, "text")
    captions = prompt_items(options.prompts_file)
    form = options.format or "png"
    if len(captions) * options.count > MOST[form]:
        raise ConfigError(
            f"--count {options.count} of {len(captions)} captions: a folder holds at most {MOST[form]:,} pictures as "
            f"{form}, {MOST['tar']:,} as tar. Use --format tar, or split the file, with an --output for each part."
        )
    options.pictures_per_tar = PICTURES_PER_TAR if form == "tar" else None
    options.threads = 1 if options.threads is None else options.threads
    options.keep_fraction = 1.0
    draw_items(options, info, [caption for caption in captions for _ in range(options.count)], ClipRanker)


def draw_grid(options: argparse.Namespace) -> None:
    """Draw the pictures of a few prompts or classes into one PNG."""
    for name, value in (("--format", options.format), ("--threads", options.threads)):
        if value is not None:
            raise ConfigError(f"{name} {value} without --prompts-file: there is one PNG to draw. Leave it out.")
    output = options.output or Path("grid.png")
    if output.suffix.lower() != ".png":
        raise ConfigError(f"--output {output}: give a name that ends in .png.")
    check_keeping(options)
    asked = options.prompts or options.classes or [None]
    if len(asked) * options.count > MOST_IN_GRID:
        raise ConfigError(
            f"--count {options.count} of {len(asked)} prompts or classes: a grid holds at most {MOST_IN_GRID:,} "
            "pictures. Use --prompts-file for more."
        )
    make_room(output)
    with loaded(options, asked_device(options.device)) as generator:
        if generator is not None:
            write_grid(options, generator, output)


def write_grid(options: argparse.Namespace, generator: ImageGenerator, output: Path) -> None:
    """Draw what is asked, choose the best of it, and write the PNG."""
    asked = options.prompts or options.classes or [None]
    rank = None if options.keep_best is None else find_ranker(options, generator)
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
    facts |= {"keep_best": options.keep_best, "scores": scores, **generator.facts}
    write_png(output, grid(pictures, columns), facts)
    print(f"{output}: {len(pictures)} pictures, {json.dumps(settings)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parser().parse_args(argv)
    if options.batch_size < 1 or options.count < 1:
        raise ConfigError(f"--count {options.count}, --batch-size {options.batch_size}: give 1 or more for each.")
    if options.prompts_file is not None:
        draw_many(options)
    else:
        draw_grid(options)


if __name__ == "__main__":
    sys.exit(cli.run(main))
