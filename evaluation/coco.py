"""Draw pictures for 30,000 captions of MS-COCO 2014 val, with top-k 1024 and top-p 0.95, as the paper's authors do."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megarq import cli
from megarq.data.picture_items import coco_items, listed_items
from megarq.errors import ConfigError
from megarq.inference.drawing_command import asked_model, draw_items, drawing_parser, parse_drawing
from megarq.scoring.rankers import ClipRanker

COUNT = 30_000
EXAMPLE = """examples:
  python evaluation/coco.py --model models/t2i --captions captions_val2014.json --output sets/coco
  torchrun --nproc_per_node 8 evaluation/coco.py ...      or deepspeed, srun, mpirun: ranks share the tars out
  python evaluation/coco.py --model models/t2i --items captions_val2014_30K_samples.json --output sets/coco

From --captions come one caption each of 30,000 of the 40,504 images, chosen by the seed. --items takes a list as it is:
COCO's annotations (the first caption of each image, by image id, as the authors read theirs), JSON strings, JSON
objects with caption and image_id, or DALL-Eval's uid_caption.csv.
Run the same command again after an interruption: tars that are done are kept. The pictures do not depend on the number
of ranks."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = drawing_parser(
        __doc__,
        EXAMPLE,
        count=f"captions to draw (default: {COUNT:,} of --captions, all of --items)",
        top_k=1024,
        top_p=0.95,
    )
    parser.add_argument("--captions", type=Path, metavar="FILE", help="COCO's captions_val2014.json")
    parser.add_argument("--items", type=Path, metavar="FILE", help="a list of captions that were chosen before")
    args = parse_drawing(parser, argv)
    if (args.captions is None) == (args.items is None):
        raise ConfigError("--captions and --items: give one of both, captions_val2014.json or a list.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    info = asked_model(args.model, "text")
    if args.items is not None:
        items = listed_items(args.items, args.count)
    else:
        items = coco_items(args.captions, args.count or COUNT, args.seed)
    draw_items(args, info, items, ClipRanker)


if __name__ == "__main__":
    sys.exit(cli.run(main))
