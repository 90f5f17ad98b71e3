"""Score pictures under a named protocol: FID, Inception Score, KID, precision and recall, CLIP score, FD-DINOv2."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megarq import cli
from megarq.files import make_room
from megarq.inference.pretrained import find_device
from megarq.scoring.evaluate import PRC_NETWORKS, REFERENCE_TRANSFORMS, Request, evaluate
from megarq.scoring.protocols import PROTOCOLS, find_protocol
from megarq.scoring.result import to_result, to_table, write_result
from megarq.scoring.scores import METRICS, ScoreSettings
from megarq.scoring.weights import add_feature_weights, parse_weights

EXAMPLE = """examples:
  python evaluation/score.py runs/coco coco-val.npz --protocol rq-paper --metrics fid,clip --json coco.json
  python evaluation/score.py drawn/ real/ --protocol torch-fidelity --metrics fid,kid,is,prc \\
      --feature-weights weights-inception-2015-12-05-6726825d.pth --json scores.json

Networks are not downloaded: each file is given, or lies in torch's cache (or the Hugging Face hub's) under its
published name, which the error says where it is missing. Numbers of different protocols cannot be compared."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", help="pictures to score: a picture set, a folder, an LMDB or tars ('{000..009}.tar')")
    parser.add_argument(
        "reference",
        nargs="?",
        help="the same, or statistics: .npz of ours or of the paper's authors, .pt of torch-fidelity",
    )
    parser.add_argument(
        "--protocol",
        required=True,
        metavar="NAME",
        help=f"how pictures become scores: {', '.join(PROTOCOLS)}, or a file.py that defines PROTOCOL",
    )
    parser.add_argument("--metrics", default="fid", help=f"some of {','.join(METRICS)} (default fid)")
    add_feature_weights(parser)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result to this file")
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=0,
        metavar="N",
        help="95%% intervals from N resamples of the images (default none)",
    )
    parser.add_argument(
        "--reference-transform",
        default="none",
        choices=list(REFERENCE_TRANSFORMS),
        help="bring reference pictures to the images' size: short side, then centre, or both sides whatever the shape "
        "(default none: they have it)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="pictures in one pass (default 64)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu ...; by default a GPU if there is one")
    parser.add_argument(
        "--workers", type=int, help="threads that decode pictures (default: one for each core, 16 at most)"
    )
    parser.add_argument("--seed", type=int, default=2020, help="of splits, subsets and resamples (default 2020)")
    parser.add_argument("--kid-subset-size", type=int, default=1000, help="pictures in a draw of KID (default 1000)")
    parser.add_argument("--kid-subsets", type=int, default=100, help="draws of KID (default 100)")
    parser.add_argument("--is-splits", type=int, default=10, help="parts of the Inception Score (default 10)")
    parser.add_argument(
        "--prc-network",
        choices=list(PRC_NETWORKS),
        help="whose features precision and recall use: vgg16, or inception as ADM's evaluator (the protocols' default)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    logging.basicConfig(format="%(message)s")
    protocol = find_protocol(args.protocol)  # a file may bring a network of its own
    request = Request(
        images=args.images,
        reference=args.reference,
        protocol=protocol,
        metrics=tuple(dict.fromkeys(name.strip() for name in args.metrics.split(",") if name.strip())),
        device=find_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")),
        weights=parse_weights(args.feature_weights),
        settings=ScoreSettings(
            seed=args.seed,
            is_splits=args.is_splits,
            kid_subsets=args.kid_subsets,
            kid_subset_size=args.kid_subset_size,
        ),
        prc_network=args.prc_network,
        bootstrap=args.bootstrap,
        batch_size=args.batch_size,
        reference_transform=args.reference_transform,
        workers=args.workers,
    )
    request.check()
    if args.json:
        make_room(args.json)
    result = to_result(evaluate(request))
    print(to_table(result))
    if args.json:
        write_result(args.json, result)


if __name__ == "__main__":
    sys.exit(cli.run(main))
