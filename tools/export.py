"""Export a training run to one folder, ready for tools/sample.py, megarq.ImageGenerator or tools/pretokenize.py."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megarq import cli
from megarq.inference.authors_export import export_authors
from megarq.inference.export import DTYPES, export_run
from megarq.inference.model_folder import ModelInfo
from megarq.inference.tensor_files import PART_BYTES

EXAMPLE = """examples:
  python tools/export.py runs/cc3m --output models/cc3m --dtype bf16
  python tools/export.py runs/rqvae --output models/rqvae-theirs --layout authors   (config.yaml beside model.pt)"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "run",
        metavar="RUN",
        help="the --output of megarq/train.py or megarq/train_rqvae.py; for --layout authors also an exported model",
    )
    arguments.add_argument("--output", required=True, metavar="FOLDER", help="the folder to write")
    arguments.add_argument("--step", type=int, help="step of the checkpoint (default: the newest whole one)")
    arguments.add_argument(
        "--weights", choices=["ema", "param"], help="moving average or last step (default: ema where the run kept it)"
    )
    arguments.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of the RQ-Transformer's weights (default: fp32)"
    )
    arguments.add_argument(
        "--layout",
        choices=["megarq", "authors"],
        default="megarq",
        help="of the folder: ours, or that of the authors' released checkpoints (default: %(default)s)",
    )
    arguments.add_argument(
        "--part-gb", type=float, default=PART_BYTES / 1e9, help="largest file of weights in GB (default: %(default)g)"
    )
    return arguments


def import_command(folder: Path, info: ModelInfo) -> str:
    """What is typed to read a folder in the authors' layout."""
    words = [
        "python",
        "tools/import_pretrained.py",
        "--rqvae",
        folder if info.transformer is None else folder / "rqvae",
    ]
    if info.transformer is not None:
        words += ["--rqtransformer", folder / "rqtransformer"]
    if info.tokenizer is not None:
        words += ["--tokenizer", folder / info.tokenizer]
    return shlex.join(map(str, [*words, "--output", "MODEL"]))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parser().parse_args(argv)
    given = (options.run, options.output, options.step, options.weights, DTYPES[options.dtype])
    info = export_authors(*given) if options.layout == "authors" else export_run(*given, int(options.part_gb * 1e9))
    if info.transformer is None:
        print(f"{options.output}: RQ-VAE {info.rqvae_fingerprint[:12]}")
    else:
        print(f"{options.output}: {info.transformer.condition} model, step {info.step}, {info.weights} weights")
    if options.layout == "authors":
        print(f"to read it back: {import_command(Path(options.output), info)}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
