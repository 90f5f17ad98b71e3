"""Pack captioned images into webdataset tars."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from megarq import cli
from megarq.data.image_shards import BadSamples
from megarq.data.image_writer import class_names, collect_captioned, collect_folder, write_image_shards
from megarq.errors import DataError

EXAMPLE = """examples:
  python tools/make_shards.py --images photos --captions photos.csv --output shards      (columns image,caption[,label])
  python tools/make_shards.py --images photos --output shards                            (captions: a.txt beside a.jpg)
  python tools/make_shards.py --images imagenet/train --class-folders --output shards    (one folder for each class)

Several rows of one image in a .csv or .tsv are its several captions. Images are shuffled, so that each shard is a fair
sample of them (one may be held out for validation); --no-shuffle keeps the order of the table, or of the names."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of .jpg, .jpeg, .png and .webp files")
    parser.add_argument(
        "--captions", type=Path, help="table .csv or .tsv with columns image,caption[,label]; by default .txt files"
    )
    parser.add_argument("--class-folders", action="store_true", help="an image's class is its folder, in sorted order")
    parser.add_argument("--output", type=Path, required=True, help="folder for the tars")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="images in one tar (default 1000)")
    parser.add_argument("--prefix", default="", help="begins the name of every tar (default: none)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle (default 0)")
    parser.add_argument("--no-shuffle", action="store_true", help="keep the order")
    parser.add_argument(
        "--max-bad-rate", type=float, default=0.01, help="share of missing images accepted (default 0.01)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    logging.basicConfig(format="%(message)s")
    if not args.images.is_dir():
        raise DataError(f"--images {args.images} is no folder. Give the folder of the pictures.")
    if args.captions and args.class_folders:
        raise DataError(
            "--captions with --class-folders: put the classes into the column `label` of the table instead."
        )
    bad = BadSamples(args.max_bad_rate)
    if args.captions:
        images = collect_captioned(args.images, args.captions, bad)
    else:
        images = collect_folder(args.images, class_folders=args.class_folders)
    shards = write_image_shards(
        images,
        args.output,
        samples_per_shard=args.samples_per_shard,
        prefix=args.prefix,
        shuffle_seed=None if args.no_shuffle else args.seed,
    )
    captions = sum(len(image.captions) for image in images)
    uncaptioned = sum(not image.captions for image in images)
    print(f"{len(images)} images with {captions} captions in {len(shards)} shards in {args.output}")
    if args.class_folders:
        print(f"{len(class_names(args.images))} classes")
    elif uncaptioned:
        print(f"{uncaptioned} images have no caption")
    if bad.bad:
        print(f"{bad.bad} rows skipped: their images are missing (named above)")


if __name__ == "__main__":
    sys.exit(cli.run(main))
