"""Describe a configuration on one page: parameters by part, shapes, tokens and FLOPs per image, hyper-parameters."""

import argparse
import json
import sys
from collections.abc import Sequence

from megarq import cli
from megarq.config.load import load_config
from megarq.planning.description import describe, render

EXAMPLE = """example:
  python tools/describe.py --model t2i-3.9b
  python tools/describe.py --model demo model.body.layers=8 --json"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a name in configs/model, or the path of a YAML file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a page")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    facts = describe(args.model, load_config(args.model, args.overrides))
    print(json.dumps(facts, indent=2) if args.json else render(facts))


if __name__ == "__main__":
    sys.exit(cli.run(main))
