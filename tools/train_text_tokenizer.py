"""Train a text tokenizer on the captions of image shards, or of a text file."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from megarq import cli
from megarq.data.faults import Faults
from megarq.data.files import expand_shards
from megarq.data.image_shards import read_samples
from megarq.errors import DataError
from megarq.text.training import Coverage, train_tokenizer

EXAMPLE = """example:
  python tools/train_text_tokenizer.py --data 'shards/*.tar' --vocab-size 16384 --output tokenizer.json

--output ending in .json: Hugging Face CharBPE in lower case, words split at spaces and punctuation.
--output ending in .model: SentencePiece BPE. Both can be trained with BPE dropout."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", nargs="+", help="webdataset tars with .txt or .json captions: paths, globs, {0000..0099}, folders"
    )
    source.add_argument("--text", type=Path, help="a text file instead, one caption per line")
    parser.add_argument("--caption-field", metavar="NAME", help="field of a picture's .json that holds its captions")
    parser.add_argument(
        "--vocab-size", type=int, default=16384, help="tokens wanted, [PAD] and [UNK] included (default 16384)"
    )
    parser.add_argument("--output", type=Path, required=True, help="tokenizer.json or tokenizer.model")
    parser.add_argument(
        "--max-bad-rate", type=float, default=0.01, help="share of broken samples accepted (default 0.01)"
    )
    return parser.parse_args(argv)


def shard_captions(patterns: Sequence[str], field: str | None, max_bad_rate: float) -> Iterator[str]:
    """Every caption of every sample, in the order of the shards."""
    faults = Faults(max_bad_rate)
    for shard in tqdm(expand_shards(patterns), desc="reading captions", unit="shard"):
        for sample in read_samples(shard, faults, field):
            yield from sample.captions
    faults.finish()


def text_captions(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file. Raises DataError where it cannot be read as one."""
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--text {path} cannot be read ({error}). Give a UTF-8 text file, one caption per line."
        ) from error


def report(coverage: Coverage, asked: int, output: Path) -> str:
    """What was trained, and what it means for the model."""
    lines = [
        f"wrote {output}: {coverage.vocab_size:,} tokens from {coverage.captions:,} captions",
        f"tokens per caption: mean {coverage.mean_length:.1f}, most {coverage.max_length}; longer than 32: "
        f"{coverage.longer_than_32:.1%}, longer than 64: {coverage.longer_than_64:.1%}",
    ]
    if coverage.vocab_size < asked:
        lines.append(
            f"the captions do not fill {asked:,} tokens; use model.cond_vocab_size={coverage.vocab_size} or more"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    if args.text:
        captions = text_captions(args.text)
    else:
        captions = shard_captions(args.data, args.caption_field, args.max_bad_rate)
    _, coverage = train_tokenizer(captions, args.vocab_size, args.output)
    print(report(coverage, args.vocab_size, args.output))


if __name__ == "__main__":
    sys.exit(cli.run(main))
