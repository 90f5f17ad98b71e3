"""Find the captions and pictures of evaluation sets among code shards, and list those samples for --exclude-keys."""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megarq import cli
from megarq.data.files import expand_shards
from megarq.errors import ConfigError
from megarq.pretokenize.overlap import (
    CaptionIndex,
    Match,
    PictureIndex,
    find_overlap,
    read_captions,
    read_pictures,
    write_exclusions,
)

EXAMPLE = """example:
  python tools/find_overlap.py yfcc-codes --captions captions_val2014.json --images 'coco-val/*.tar' \\
      --training-images 'shards/yfcc/*.tar' --output exclude.txt --workers 8

Captions are found when they are equal but for case, punctuation, white space and Unicode form; paraphrases are not.
Pictures are looked for in the image shards that the codes were made from, so the transform does not matter: a copy that
was compressed or scaled again is found; another crop, a mirrored copy or a strong edit is not. Every picture is decoded
once. Captions of few words and plain pictures match by chance and are left out; both are counted."""
EXAMPLES = 5


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("codes", type=Path, metavar="CODES", help="folder of the training set's code shards")
    parser.add_argument(
        "--captions",
        nargs="+",
        default=[],
        help="COCO annotations or a list (.json), lines (.txt), column caption (.csv .tsv), or image shards",
    )
    parser.add_argument("--images", nargs="+", help="image shards of the evaluation set")
    parser.add_argument("--training-images", nargs="+", help="with --images: image shards that CODES was made from")
    parser.add_argument("--output", type=Path, required=True, help="exclusion list to write")
    parser.add_argument("--min-words", type=int, default=4, help="words of a caption that counts (default: 4)")
    parser.add_argument("--share", type=float, default=0.9, help="bits of a picture that must be equal (default: 0.9)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read shards (default: only this one)")
    return parser.parse_args(argv)


def summary(args: argparse.Namespace, captions: CaptionIndex | None, pictures: PictureIndex | None) -> list[str]:
    """What was looked for."""
    lines = [f"samples of {args.codes} that stand in an evaluation set"]
    if captions is not None:
        lines.append(
            f"captions: {len(captions)} different ones of {' '.join(args.captions)}; "
            f"{captions.too_short} of fewer than {args.min_words} words left out"
        )
    if pictures is not None:
        lines.append(
            f"pictures: {len(pictures)} of {' '.join(args.images)}, {args.share:.0%} of bits equal; "
            f"{pictures.plain} plain ones left out"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    logging.basicConfig(format="%(message)s")
    if not args.captions and not args.images:
        raise ConfigError("neither --captions nor --images. Give the evaluation set's captions, pictures, or both.")
    if args.workers < 0:
        raise ConfigError(f"--workers {args.workers}: give 0 or more.")
    if bool(args.images) != bool(args.training_images):
        raise ConfigError(
            "--images without --training-images, or the reverse. Codes are of crops made by chance, so pictures are "
            "looked for in the image shards that CODES was made from: give both, or --captions alone."
        )
    captions = CaptionIndex(read_captions(args.captions), args.min_words) if args.captions else None
    pictures, searched = None, list[str]()
    if args.images:
        pictures = PictureIndex(*read_pictures(expand_shards(args.images), args.workers), args.share)
        searched = expand_shards(args.training_images)
    matches: list[Match] = list(find_overlap(args.codes, captions, pictures, searched, workers=args.workers))
    header = summary(args, captions, pictures)
    excluded = write_exclusions(args.output, matches, header)
    kinds = Counter(match.kind for match in matches)
    print("\n".join(header))
    print(f"{excluded} samples in {args.output}: {kinds['caption']} by caption, {kinds['picture']} by picture")
    for kind in ("caption", "picture"):
        for match in [match for match in matches if match.kind == kind][:EXAMPLES]:
            print(f"  {match.sample}  {kind}: {match.reason}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
