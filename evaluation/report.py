"""Make one self-contained page of results: scores, what they depend on, scores against steps, pictures."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from megarq import cli
from megarq.files import make_room, write_atomically
from megarq.scoring.report import FEWEST_SAMPLES, SAMPLES, SAMPLES_OF_ALL, ReportRequest, make_report

EXAMPLE = """examples:
  python evaluation/report.py coco.json --output report.html
  python evaluation/report.py 'runs/scores/step-*.json' --output report.html --reference coco/val2014

The page needs nothing beside it: send it, print it, open it anywhere."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", help="results of score.py --json: files, folders or globs")
    parser.add_argument("--output", type=Path, required=True, help="file to write, .html")
    parser.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="SET",
        help="where the scored pictures lie now, if they were moved; once for each set, in the results' order",
    )
    parser.add_argument(
        "--reference",
        metavar="PICTURES",
        help="pictures to stand beside the generated ones (default: those the results name)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        help=f"pictures shown of each set, 0 for none (default {SAMPLES}; of several sets {SAMPLES_OF_ALL} in all, "
        f"at least {FEWEST_SAMPLES} of each)",
    )
    parser.add_argument("--first", action="store_true", help="show the first of each set, not some spread evenly")
    parser.add_argument("--title", default="Evaluation", help="heading of the page (default: Evaluation)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    logging.basicConfig(format="%(message)s")
    make_room(args.output)
    page = make_report(
        ReportRequest(args.results, args.images, args.reference, args.samples, args.first, args.title)
    ).encode()
    write_atomically(args.output, page)
    print(f"{args.output}: {len(page) / 1000:,.0f} kB")


if __name__ == "__main__":
    sys.exit(cli.run(main))
