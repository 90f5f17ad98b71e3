"""Check a folder of code shards: damage, counts, the RQ-VAE it is of, and whether its codes and captions look right."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch

from megarq import cli
from megarq.data.code_shards import CodeShards
from megarq.data.files import expand_shards
from megarq.errors import ConfigError
from megarq.files import write_atomically
from megarq.inference.pretrained import find_device, load_rqvae
from megarq.pretokenize.pictures import by_source_name, grid
from megarq.pretokenize.verify import Report, Status, report_reconstruction, verify
from megarq.rqvae.model import RQVAE
from megarq.text.tokenizer import TextTokenizer

EXAMPLE = """examples:
  python tools/verify_codes.py codes --workers 8
  python tools/verify_codes.py codes --model models/t2i --tokenizer tokenizer.json --length 64 \\
      --images 'shards/{00000..00099}.tar' --output check

Exit status: 0 the folder is fit to train on, 1 it is not (some check FAILED; with --strict, a warning too), 2 the
command itself is wrong. The codebook's perplexity is exp(entropy) of how often its codes occur in the data; the
perplexity of Q is the number of codes among which one draw effectively chooses."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("codes", type=Path, metavar="CODES", help="folder made by tools/pretokenize.py")
    parser.add_argument("--model", type=Path, help="exported model, RQ-VAE or run that the codes should be of")
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json or .model; tells how many captions --length cuts"
    )
    parser.add_argument("--length", type=int, help="tokens of a caption that training reads (model.cond_length)")
    parser.add_argument("--images", nargs="+", help="image shards of the codes, for the reconstruction error")
    parser.add_argument("--sample", type=int, default=256, help="pictures to reconstruct (default: 256)")
    parser.add_argument("--grid", type=int, default=24, help="pictures in grid.png (default: 24)")
    parser.add_argument("--seed", type=int, default=0, help="which pictures those are (default: 0)")
    parser.add_argument("--output", type=Path, help="folder for grid.png and report.json")
    parser.add_argument("--workers", type=int, default=0, help="processes that read shards (default: only this one)")
    parser.add_argument("--device", help="for decoding: cuda, cpu ...; by default a GPU if there is one")
    parser.add_argument("--strict", action="store_true", help="warnings fail, too")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises: SystemExit 1 where the folder is not fit to train on."""
    args = parse(argv)
    logging.basicConfig(format="%(message)s")
    if (args.tokenizer is None) != (args.length is None):
        raise ConfigError("--tokenizer without --length, or --length without --tokenizer: give both or neither.")
    if min(args.workers, args.sample - 1, args.grid - 1, (args.length or 1) - 1) < 0:
        raise ConfigError(
            f"--workers {args.workers}, --sample {args.sample}, --grid {args.grid}, --length {args.length}: "
            "give 0 workers or more, and 1 or more of the others."
        )
    if not args.codes.is_dir():
        raise ConfigError(f"CODES {args.codes}: no such folder. Give the --output of tools/pretokenize.py.")
    device = find_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_rqvae(_rqvae_folder(args.model), device) if args.model else None
    tokenizer = TextTokenizer.load(args.tokenizer) if args.tokenizer else None
    sources = by_source_name(expand_shards(args.images)) if args.images else {}
    report, whole = verify(args.codes, rqvae=model, tokenizer=tokenizer, length=args.length, workers=args.workers)
    if whole is not None and (args.output or sources):
        rqvae = _rqvae(report, args.codes, model, device)
        if rqvae is not None:
            if sources:
                report_reconstruction(report, whole, rqvae, sources, args.sample, args.seed)
            if args.output:
                _write_grid(args.output, whole, rqvae, args.grid, args.seed)
    content = json.dumps(report.as_json(), indent=2)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output / "report.json", content + "\n")
    print(content if args.json else report.text())
    if not report.passed(args.strict):
        raise SystemExit(1)


def _rqvae_folder(model: Path) -> Path:
    """A run of train.py keeps its RQ-VAE in a folder of its own."""
    return model / "rqvae" if (model / "rqvae" / "config.json").is_file() else model


def _rqvae(report: Report, folder: Path, model: RQVAE | None, device: torch.device) -> RQVAE | None:
    """The RQ-VAE that wrote the codes, the one in the folder or the given one; None where neither did."""
    passed = {check.name for check in report.checks if check.status is Status.OK}
    if "stored RQ-VAE" in passed:
        return load_rqvae(folder, device)
    return model if "given model" in passed else None


def _write_grid(output: Path, shards: CodeShards, rqvae: RQVAE, count: int, seed: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    content = BytesIO()
    grid(shards, rqvae, count, seed).save(content, "PNG")
    write_atomically(output / "grid.png", content.getvalue())


if __name__ == "__main__":
    sys.exit(cli.run(main))
