"""Pack captioned images into webdataset tars."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megarq import cli
from megarq.data.faults import Faults
from megarq.data.files import expand_shards
from megarq.data.image_lists import ImageList, list_captioned, list_folder
from megarq.data.image_stores import open_store
from megarq.data.image_writer import write_image_shards
from megarq.data.tar_lists import TarList
from megarq.errors import DataError

EXAMPLE = """examples:
  python tools/make_shards.py --images photos --output shards                            (captions: a.txt beside a.jpg)
  python tools/make_shards.py --images photos --captions photos.csv --output shards      (columns image,caption[,label])
  python tools/make_shards.py --images train2014.zip --captions captions_train2014.json --output coco      (MS-COCO)
  python tools/make_shards.py --images cc3m --captions Train_GCC-training.tsv --output shards --max-bad-rate 0.5
  python tools/make_shards.py --images imagenet/train --class-folders --output shards    (one folder for each class)
  python tools/make_shards.py --shards 'old/{00000..00331}.tar' --output shards --samples-per-shard 10000

--images is a folder, a zip, which is not unpacked, or a folder with a data.mdb, as LSUN's. The kind of --captions is
seen from its content: a table (several rows of one image are its captions), MS-COCO's JSON, or a .tsv of caption and
url as CC-3M and CC-12M publish it, where row n, counted from --first-number, is the image whose file name is the number
n (7.jpg, 00000/000000007.png). Images are shuffled, so that each shard is a fair sample of them (one may be held out
for validation); --no-shuffle keeps the order. Run the same command again after an interruption: finished shards are
kept."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--images", type=Path, help="folder or zip of picture files (jpg, jpeg, png, webp, bmp, tif, tiff), or LMDB"
    )
    source.add_argument("--shards", nargs="+", help="webdataset tars to pack anew: paths, globs, {0000..0099}, folders")
    said = parser.add_mutually_exclusive_group()
    said.add_argument("--captions", type=Path, help="table, MS-COCO .json or .tsv of urls; by default .txt files")
    said.add_argument("--class-folders", action="store_true", help="an image's class is its folder, in sorted order")
    parser.add_argument(
        "--first-number", type=int, default=0, choices=(0, 1), help="name of a .tsv of urls' first image (default 0)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the tars")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="images in one tar (default 1000)")
    parser.add_argument("--prefix", default="", help="begins the name of every tar (default: none)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle (default 0)")
    parser.add_argument("--no-shuffle", action="store_true", help="keep the order")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that write tars")
    parser.add_argument("--max-bad-rate", type=float, default=0.01, help="share of faults accepted (default 0.01)")
    return parser.parse_args(argv)


def collect(args: argparse.Namespace, faults: Faults) -> ImageList | TarList:
    """The list of samples that was asked for."""
    if args.shards:
        if args.captions or args.class_folders:
            raise DataError("--captions and --class-folders go with --images, not with --shards. Leave them out.")
        return TarList(expand_shards(args.shards), faults, args.workers)
    store = open_store(args.images)
    if args.captions:
        return list_captioned(store, args.captions, faults, first_number=args.first_number)
    return list_folder(store, faults, class_folders=args.class_folders)


def report(samples: ImageList | TarList, shards: Sequence[Path], faults: Faults, output: Path) -> str:
    """What was packed, and what was not."""
    lines = [f"{len(samples)} images in {len(shards)} shards in {output}"]
    if isinstance(samples, ImageList):
        first = samples.images[0]
        captions = sum(len(image.captions) for image in samples.images)
        uncaptioned = sum(not image.captions for image in samples.images)
        classes = {image.label for image in samples.images} - {None}
        lines.append(f"{captions} captions, {uncaptioned} images without one, {len(classes)} classes")
        lines += [f"first of the list: {first.name}: {first.captions[0]}"] if first.captions else []
        lines += [f"{count} {what}, left out" for what, count in samples.unused.items() if count]
    lines += [f"{count} x {kind} (each is named above)" for kind, count in faults.counts.most_common()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    logging.basicConfig(format="%(message)s")
    faults = Faults(args.max_bad_rate)
    samples = collect(args, faults)
    shards = write_image_shards(
        samples,
        args.output,
        faults,
        samples_per_shard=args.samples_per_shard,
        prefix=args.prefix,
        shuffle_seed=None if args.no_shuffle else args.seed,
        workers=args.workers if args.workers > 1 else 0,
    )
    print(report(samples, shards, faults, args.output))


if __name__ == "__main__":
    sys.exit(cli.run(main))
