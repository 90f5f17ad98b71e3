"""Tell where training runs stand: step, time left, losses, speed, checkpoints, restarts, warnings."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megarq import cli
from megarq.engine.status import Status, as_json, page, status
from megarq.errors import ConfigError, DataError

EXAMPLE = """example:
  python tools/status.py runs/t2i
  python tools/status.py runs/* --watch 10
  python tools/status.py runs/t2i --json"""
CLEAR = "\033[H\033[2J"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the --output folder of a training run")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="tell it again and again, until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print a JSON line a run instead of a page")
    return parser.parse_args(argv)


def look(runs: Sequence[Path]) -> tuple[list[Status], list[str]]:
    """The runs, and lines about what is none. Raises DataError for a single folder that is none."""
    found, missing = [], []
    for run in runs:
        try:
            found.append(status(run))
        except DataError as error:
            if len(runs) == 1:
                raise
            missing.append(str(error))
    return found, missing


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    if args.watch is not None and not args.watch > 0:
        raise ConfigError(f"--watch {args.watch:g}: give seconds, above 0.")
    while True:
        found, missing = look(args.runs)
        if args.json:
            text = "\n".join(json.dumps(as_json(run)) for run in found)
        else:
            text = "\n\n".join([*map(page, found), *missing])
        print(f"{CLEAR}{text}" if args.watch and sys.stdout.isatty() else text, flush=True)
        if not args.watch:
            return
        time.sleep(args.watch)


if __name__ == "__main__":
    sys.exit(cli.run(main))
