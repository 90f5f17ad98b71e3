"""Train an RQ-VAE on image shards.

    deepspeed megarq/train_rqvae.py --ds_config zero1.json --model rqvae-8x8x4 --data 'shards/{00000..03999}.tar' \\
        --output RUN loss.perceptual_weight=0 loss.adversarial_weight=0

Also under torchrun, srun (one task per rank) and mpirun, or as plain `python megarq/train_rqvae.py ...` on one device.
A run goes on from its newest checkpoint when --output holds one.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from megarq import cli
from megarq.config.load import load_config
from megarq.config.run import RQVAERunConfig
from megarq.engine.rqvae_run import check_rqvae_run, train_rqvae
from megarq.engine.start import joined_session
from megarq.planning.flops import rqvae_training_flops


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, build, run."""
    args = cli.parse_training(parser(), argv)
    cli.require(args, model="rqvae-8x8x4", data="'shards/*.tar'", output="RUN")
    config = load_config(args.model, args.overrides, "rq-vae")
    assert isinstance(config, RQVAERunConfig)
    with joined_session(config, args.ds_config, args.output, partial(check_rqvae_run, config)) as session:
        train_rqvae(session, args.data, args.validation_data, rqvae_training_flops(config.model))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.training_parser(__doc__, "zero1.json")
    parser.add_argument("--model", help="name in configs/model (rqvae-8x8x4, rqvae-demo, ...) or a YAML file")
    parser.add_argument("--data", nargs="+", help="image shards: webdataset tars, globs or brace patterns")
    parser.add_argument("--validation-data", nargs="+", default=[], help="held-out image shards")
    return parser


if __name__ == "__main__":
    sys.exit(cli.run(main))
