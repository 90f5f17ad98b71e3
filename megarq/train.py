"""Train an RQ-Transformer on code shards.

    deepspeed megarq/train.py --ds_config zero3.json --model t2i-3.9b --data CODES --tokenizer tokenizer.json \\
        --output RUN train.steps=200000 train.micro_batch_size=16

Also under torchrun, srun (one task per rank) and mpirun, or as plain `python megarq/train.py ...` on one device.
A run goes on from its newest checkpoint when --output holds one.
"""

import argparse
import sys

if __name__ == "__main__":  # what comes while torch is imported, for seconds, is heard too
    from megarq.launch.stop import listen

    listen()

from collections.abc import Sequence
from pathlib import Path

from megarq import cli
from megarq.config.load import load_config
from megarq.config.run import RQTransformerRunConfig
from megarq.data.mixture import parse_sources
from megarq.engine.start import joined_session
from megarq.engine.transformer_run import train_transformer
from megarq.planning.flops import layer_flops, training_flops


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, build, run."""
    args = cli.parse_training(parser(), argv)
    cli.require(args, model="t2i-3.9b", data="CODES", output="RUN")
    config = load_config(args.model, args.overrides, "rq-transformer")
    assert isinstance(config, RQTransformerRunConfig)
    sources = parse_sources(args.data, args.exclude_keys)
    with joined_session(config, args.ds_config, args.output) as session:
        train_transformer(
            session,
            sources,
            Path(args.tokenizer) if args.tokenizer else None,
            Path(args.validation_data) if args.validation_data else None,
            layer_flops(config.model),
            training_flops(config.model),
        )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.training_parser(__doc__, "zero3.json")
    parser.add_argument("--model", help="name in configs/model (t2i-3.9b, cc3m-654m, demo, ...) or a YAML file")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FOLDER[:WEIGHT]",
        help="folders of code shards (the --output of tools/pretokenize.py), and passes over each in an epoch (1)",
    )
    parser.add_argument(
        "--exclude-keys",
        nargs="+",
        default=[],
        metavar="[FOLDER=]FILE",
        help="lists of samples to leave out: a key, or 000017.tar/KEY, on each line; of all folders or of one",
    )
    parser.add_argument("--tokenizer", help="tokenizer.json or .model; needed by models with captions")
    parser.add_argument("--validation-data", help="held-out folder of code shards, or set data.validation_shards=N")
    return parser


if __name__ == "__main__":
    sys.exit(cli.run(main))
