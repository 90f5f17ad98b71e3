"""What every command line shares: errors for people, and no traceback where they can mend it."""

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from megarq.errors import (
    ConfigError,
    DivergenceError,
    FaultError,
    LostDataError,
    MegarqError,
    PreflightError,
    RunHeldError,
    Stopped,
    is_fault,
)
from megarq.launch.environment import read_environment
from megarq.launch.stop import STOPPED

HELD = 73
"""Exit status where another job trains into the run's folder: sysexits' EX_CANTCREAT."""
SECONDS_FOR_RANK_ZERO = 5
SAME_ON_ALL_RANKS = (ConfigError, DivergenceError, FaultError, LostDataError, PreflightError)
INTERRUPTED = "interrupted"
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)+=")


def run(main: Callable[[], None]) -> int:
    """Run a command and return its exit status.

    0; 2 after printing a MegarqError on stderr, but 1 after a fault that a restart may mend, and 73 where another job
    trains into the folder; 75 where training stopped as asked; 130 when interrupted.

    What is the same on all ranks of a job is printed by rank 0 alone.
    """
    rank = _rank()
    try:
        main()
    except MegarqError as error:
        if rank == 0 or not isinstance(error, SAME_ON_ALL_RANKS):
            print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr)
        else:
            time.sleep(SECONDS_FOR_RANK_ZERO)  # a launcher ends all ranks with the first, and rank 0 must have spoken
        return _status(error)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}. Check the path, its rights and the disk.", file=sys.stderr)
        return _status(error)
    except Stopped as stopped:
        if rank == 0:
            print(stopped)
        return STOPPED
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130
    return 0


def _status(error: MegarqError | OSError) -> int:
    if isinstance(error, RunHeldError):
        return HELD
    return 1 if is_fault(error) else 2


def _say_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In place of the traceback of Ctrl-C while a command still imports, or already ends."""
    if issubclass(kind, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _say_interrupted


def _rank() -> int:
    try:
        return read_environment(os.environ, meet=False).rank
    except ConfigError:
        return 0


def training_parser(description: str | None, ds_config: str) -> argparse.ArgumentParser:
    """The options that both training commands have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ds_config", default=ds_config, help=f"DeepSpeed's JSON, or a name in configs/deepspeed (default {ds_config})"
    )
    parser.add_argument("--output", help="folder of the run; a run that is there goes on")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, such as train.lr=1e-3")
    return parser


def parse_training(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a training command; options that take several folders leave the key=value after them to `overrides`."""
    args = parser.parse_intermixed_args(argv)
    for name, given in vars(args).items():
        if isinstance(given, list) and name in ("data", "validation_data"):
            setattr(args, name, [value for value in given if not OVERRIDE.match(value)])
            args.overrides += [value for value in given if OVERRIDE.match(value)]
    return args


def require(args: argparse.Namespace, **examples: str) -> None:
    """Raise ConfigError with the complete command to type where one of these options is missing."""
    missing = [f"--{name}" for name in examples if not getattr(args, name)]
    if missing:
        script = "train_rqvae.py" if hasattr(args, "init_from") else "train.py"
        if script == "train.py":
            examples["tokenizer"] = "tokenizer.json"
        if args.validation_data:
            examples["validation-data"] = _as_typed(args.validation_data)
        for name in ("exclude-keys", "init-from", "init-weights"):
            if getattr(args, name.replace("-", "_"), None):
                examples[name] = _given(args, name)
        options = [f"--{name} {_given(args, name) or example}" for name, example in examples.items()]
        overrides = _as_typed(args.overrides) or "[key=value ...]"
        command = " ".join([f"deepspeed megarq/{script} --ds_config {args.ds_config}", *options, overrides])
        raise ConfigError(f"{', '.join(missing)} missing. The complete command:\n    {command}")


def _given(args: argparse.Namespace, name: str) -> str:
    return _as_typed(getattr(args, name.replace("-", "_")))


def _as_typed(value: str | list[str] | None) -> str:
    return shlex.join([value] if isinstance(value, str) else value or [])
