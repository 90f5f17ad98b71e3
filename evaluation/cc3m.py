"""Draw a picture for each validation caption of CC-3M, with the model's own top-k and top-p, as the paper does."""

import argparse
import sys
from collections.abc import Sequence

from megarq import cli
from megarq.data.picture_items import caption_items
from megarq.inference.drawing_command import asked_model, draw_items, drawing_parser, parse_drawing
from megarq.scoring.rankers import ClipRanker

EXAMPLE = """examples:
  python evaluation/cc3m.py --model models/cc3m --captions Validation_GCC-1.1.0-Validation.tsv --output sets/cc3m
  torchrun --nproc_per_node 8 evaluation/cc3m.py --model models/cc3m --captions 'shards/val/*.tar' --output sets/cc3m

From image shards come the captions of the pictures that are there: some addresses of the published list have died, and
FID compares with the pictures that were downloaded."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = drawing_parser(__doc__, EXAMPLE, count="draw for the first so many captions (default: all)")
    parser.add_argument(
        "--captions",
        required=True,
        nargs="+",
        metavar="FILE",
        help="the published .tsv, a list of picture<TAB>caption, or image shards with captions",
    )
    return parse_drawing(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    info = asked_model(args.model, "text")
    draw_items(args, info, caption_items(args.captions, args.count), ClipRanker)


if __name__ == "__main__":
    sys.exit(cli.run(main))
