"""Make statistics of reference pictures (COCO, CC-3M, ImageNet, FFHQ, LSUN ..), once for many scores."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megarq import cli
from megarq.data.pictures import open_pictures
from megarq.errors import ConfigError
from megarq.files import make_room
from megarq.inference.pretrained import find_device
from megarq.scoring.evaluate import REFERENCE_TRANSFORMS, first_size, make_reference
from megarq.scoring.networks import LAYERS, build_network
from megarq.scoring.protocols import PROTOCOLS, find_protocol
from megarq.scoring.result import DIGITS
from megarq.scoring.statistics import write_statistics
from megarq.scoring.weights import add_feature_weights, find_weights, parse_weights

EXAMPLE = """examples:
  python evaluation/reference_stats.py coco/val2014 --protocol rq-paper --transform squeeze --resolution 256 \\
      --output coco-val.npz
  python evaluation/reference_stats.py 'imagenet/{0000..1280}.tar' --protocol rq-paper --transform center \\
      --resolution 256 --output imagenet-train.npz

The statistics belong to one protocol, one file of weights and one size, and score.py refuses them for another."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", help="a folder, an LMDB, a picture set, or tars: paths, globs, {0000..0099}")
    parser.add_argument(
        "--protocol",
        required=True,
        metavar="NAME",
        help=f"the one that scores will use: {', '.join(PROTOCOLS)}, or a file.py that defines PROTOCOL",
    )
    parser.add_argument("--output", type=Path, required=True, help="file to write, .npz")
    parser.add_argument(
        "--transform",
        default="center",
        choices=list(REFERENCE_TRANSFORMS),
        help="center: short side to --resolution, then the centre (default); squeeze: both sides, whatever the shape; "
        "none: pictures of one size as they are",
    )
    parser.add_argument("--resolution", type=int, default=256, help="of the pictures that will be scored (default 256)")
    parser.add_argument(
        "--networks", help=f"some of {','.join(LAYERS)} (default: the protocol's, which is inception in all named ones)"
    )
    parser.add_argument("--features", action="store_true", help="keep the features too, for KID, precision and recall")
    add_feature_weights(parser)
    parser.add_argument("--batch-size", type=int, default=64, help="pictures in one pass (default 64)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu ...; by default a GPU if there is one")
    parser.add_argument(
        "--workers", type=int, help="threads that decode pictures (default: one for each core, 16 at most)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    logging.basicConfig(format="%(message)s")
    if args.output.suffix != ".npz":
        raise ConfigError(f"--output {args.output}: name a file that ends in .npz.")
    for name, given in (("resolution", args.resolution), ("batch-size", args.batch_size)):
        if given < 1:
            raise ConfigError(f"--{name} {given}: use 1 or more.")
    protocol = find_protocol(args.protocol)  # a file may bring a network of its own
    networks = protocol.network if args.networks is None else args.networks
    names = [name.strip() for name in networks.split(",") if name.strip()]
    unknown = [name for name in names if name not in LAYERS]
    if unknown or not names:
        raise ConfigError(f"--networks {args.networks}: use some of {', '.join(LAYERS)}.")
    device = find_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    given = parse_weights(args.feature_weights)
    pictures = open_pictures(args.pictures)
    make_room(args.output)
    if args.transform != "none" and max(found := first_size(pictures)) < args.resolution:
        logging.warning(
            f"warning: pictures of {found[0]}x{found[1]} are enlarged to {args.resolution}x{args.resolution}: "
            "give the size of those that will be scored as --resolution."
        )
    reference = make_reference(
        pictures,
        [build_network(name, protocol, [LAYERS[name]], find_weights(name, given), device) for name in names],
        protocol,
        device,
        size=None if args.transform == "none" else (args.resolution, args.resolution),
        transform=args.transform,
        batch_size=args.batch_size,
        workers=args.workers,
        keep=names if args.features else (),
    )
    write_statistics(args.output, reference, args.features)
    size = "x".join(map(str, reference.size or ()))
    print(
        f"{args.output}: {', '.join(names)} of {reference.count} pictures of {size} under {protocol.name}, "
        f"pictures' sha256 {reference.sha256[:DIGITS]}"
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
