"""What every command line shares: errors for people, and no traceback where they can mend it."""

import sys
from collections.abc import Callable

from megarq.errors import MegarqError


def run(main: Callable[[], None]) -> int:
    """Run a command and return its exit status: 0, 2 after printing a MegarqError on stderr, 130 when interrupted."""
    try:
        main()
    except MegarqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
