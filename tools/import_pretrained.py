"""Turn checkpoints in the layout of the authors' released ones (config.yaml beside model.pt) into an exported model."""

import argparse
import sys
from collections.abc import Sequence

from megarq import cli
from megarq.inference.authors import import_pretrained

EXAMPLE = (
    "example: python tools/import_pretrained.py --rqvae cc3m/stage1 --rqtransformer cc3m/stage2 "
    "--tokenizer tokenizer.json --output models/cc3m"
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    arguments.add_argument("--rqvae", required=True, metavar="DIR", help="folder of the RQ-VAE")
    arguments.add_argument(
        "--rqtransformer", metavar="DIR", help="folder of the RQ-Transformer (default: RQ-VAE alone)"
    )
    arguments.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json or .model of a text model")
    arguments.add_argument("--output", required=True, metavar="FOLDER", help="the folder to write")
    arguments.add_argument(
        "--weights",
        choices=["ema", "param"],
        help="state_dict_ema or state_dict (default: state_dict, as the authors' loader)",
    )
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parser().parse_args(argv)
    info = import_pretrained(options.rqvae, options.output, options.rqtransformer, options.tokenizer, options.weights)
    kind = "RQ-VAE" if info.transformer is None else f"{info.transformer.condition} model, {info.weights} weights"
    print(f"{options.output}: {kind}, RQ-VAE fingerprint {info.rqvae_fingerprint[:12]}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
