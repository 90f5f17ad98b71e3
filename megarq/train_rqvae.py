"""Train an RQ-VAE on pictures: image shards, folders, or LSUN's LMDB.

    deepspeed megarq/train_rqvae.py --ds_config zero1.json --model rqvae-8x8x4 --data 'shards/{00000..03999}.tar' \\
        --output RUN --perceptual-weights vgg16-397923af.pth

Also under torchrun, srun (one task per rank) and mpirun, or as plain `python megarq/train_rqvae.py ...` on one device.
With --init-from FOLDER it starts from another RQ-VAE's weights; --model may then be left out.
A run goes on from its newest checkpoint when --output holds one.
"""

import argparse
import sys

if __name__ == "__main__":  # what comes while torch is imported, for seconds, is heard too
    from megarq.launch.stop import listen

    listen()

from collections.abc import Sequence
from functools import partial

from megarq import cli
from megarq.config.load import load_config
from megarq.engine.finetuning import InitFrom, config_of_source
from megarq.engine.rqvae_run import check_rqvae_run, train_rqvae
from megarq.engine.start import joined_session
from megarq.planning.flops import rqvae_training_flops


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, build, run."""
    args = cli.parse_training(parser(), argv)
    model = {} if args.init_from and not args.model else {"model": "rqvae-8x8x4"}
    cli.require(args, **model, data="'shards/*.tar'", output="RUN")
    init = InitFrom(args.init_from, args.init_weights) if args.init_from else None
    if init is not None and not args.model:
        config = config_of_source(init, args.output, args.overrides)
    else:
        config = load_config(args.model, args.overrides, "rq-vae")
    check = partial(check_rqvae_run, config, perceptual_weights=args.perceptual_weights)
    with joined_session(config, args.ds_config, args.output, check) as session:
        flops = partial(rqvae_training_flops, config)
        train_rqvae(session, args.data, args.validation_data, flops, args.perceptual_weights, init)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.training_parser(__doc__, "zero1.json")
    parser.add_argument("--model", help="name in configs/model (rqvae-8x8x4, rqvae-demo, ...) or a YAML file")
    parser.add_argument(
        "--data",
        nargs="+",
        help="webdataset tars (globs or brace patterns), folders of pictures such as imagenet/train, or LMDB as LSUN's",
    )
    parser.add_argument("--validation-data", nargs="+", default=[], help="held-out pictures, in any of these forms")
    parser.add_argument(
        "--init-from",
        metavar="FOLDER",
        help="start from this RQ-VAE: an exported model, a run of this command, or the authors' config.yaml + model.pt",
    )
    parser.add_argument(
        "--init-weights",
        choices=["ema", "param"],
        help="moving average or last step of --init-from (default: a run's average, the authors' state_dict)",
    )
    parser.add_argument(
        "--perceptual-weights", metavar="FILE", help="torchvision's vgg16-397923af.pth, for LPIPS (or in torch's cache)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(cli.run(main))
