"""Draw 50,000 pictures, as the paper does: equally many of each class, or from a model without condition."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from megarq import cli
from megarq.data.picture_items import class_items
from megarq.data.picture_set import Item
from megarq.inference.drawing_command import asked_model, draw_items, drawing_parser, parse_drawing
from megarq.scoring.rankers import ClassRanker

COUNT = 50_000
EXAMPLE = """examples:
  torchrun --nproc_per_node 8 evaluation/class_conditional.py --model models/imagenet-1.4b --output sets/imagenet
  python evaluation/class_conditional.py --model models/ffhq --output sets/ffhq
  python evaluation/class_conditional.py --model models/imagenet-1.4b --output sets/imagenet-5 \\
      --keep-fraction 0.05 --ranker-weights resnet101-63fe2227.pth

Classes come in rising order. With --keep-fraction F, the n pictures of a class are the best of n/F by the probability
that a ResNet-101 gives the class."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    return parse_drawing(drawing_parser(__doc__, EXAMPLE, count=f"pictures in all (default: {COUNT:,})"), argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    info = asked_model(args.model, "class", "none")
    assert info.transformer is not None
    count = args.count or COUNT
    classes = info.transformer.cond_vocab_size
    items = class_items(count, classes) if info.transformer.condition == "class" else [Item()] * count
    draw_items(args, info, items, partial(ClassRanker, classes=classes))


if __name__ == "__main__":
    sys.exit(cli.run(main))
