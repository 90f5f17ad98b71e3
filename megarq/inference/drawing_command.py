"""What the commands that draw picture sets share: evaluation/coco.py, cc3m.py, class_conditional.py, tools/sample.py.

python evaluation/coco.py ...            one worker; a second one, started anywhere, shares the work
torchrun, deepspeed, srun, mpirun        a worker for each rank; sbatch --array as many more
"""

import argparse
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from megarq.data.picture_items import check_count
from megarq.data.picture_set import Item, begin_set
from megarq.errors import ConfigError
from megarq.inference.drawing import PICTURES_PER_TAR, draw_pictures, drawing_settings, lay_out
from megarq.inference.generator import ImageGenerator
from megarq.inference.model_folder import ModelInfo, read_info
from megarq.inference.options import DRAWING_DTYPES, add_sampling_options
from megarq.inference.pretrained import find_device
from megarq.inference.sharing import shared_generator
from megarq.launch.environment import read_environment, worker_place
from megarq.launch.process_group import rank_device


class Ranker(Protocol):
    """Scores pictures, by a network whose weights it names."""

    network: str

    @property
    def sha256(self) -> str:
        """Of the file of weights."""

    def __call__(self, pictures: Sequence[Image.Image], items: Sequence[Item]) -> Sequence[float]:
        """The higher, the better."""


MakeRanker = Callable[[Path | None, torch.device], Ranker]
"""From a file of weights, None for the one in a cache, and a device to a ranker."""
_SCRIPTS = {
    "text": "evaluation/coco.py or cc3m.py",
    "class": "evaluation/class_conditional.py",
    "none": "evaluation/class_conditional.py",
}


def drawing_parser(
    description: str | None, epilog: str, *, count: str, top_k: int | None = None, top_p: float | None = None
) -> argparse.ArgumentParser:
    """A command line with the options that all share; `count` is the help of --count, None its default."""
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="an exported model")
    parser.add_argument("--output", type=Path, required=True, metavar="SET", help="folder for the pictures")
    parser.add_argument("--count", type=int, help=count)
    add_sampling_options(parser, top_k, top_p)
    parser.add_argument("--device", help="cuda, cuda:1, cpu ...; by default this rank's GPU if there is one")
    parser.add_argument(
        "--threads", type=int, default=1, help="of each rank on a CPU; the pictures' bits depend on it (default: 1)"
    )
    parser.add_argument(
        "--pictures-per-tar",
        type=int,
        default=PICTURES_PER_TAR,
        help="most pictures of a tar, which one rank draws; interrupted, it is begun anew (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-fraction",
        type=float,
        default=1.0,
        metavar="F",
        help="draw n/F candidates for n pictures and keep the n that a ranker scores highest (default: 1, draw n)",
    )
    parser.add_argument(
        "--ranker-weights", type=Path, metavar="FILE", help="weights of the ranker (default: those in torch's cache)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def parse_drawing(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options. Raises: ConfigError for those that do not go together, or are out of range."""
    args = parser.parse_args(argv)
    warn_on_rank_zero()
    check_count(args.count)
    if not 0 < args.keep_fraction <= 1:
        raise ConfigError(f"--keep-fraction {args.keep_fraction}: give a share above 0 and at most 1, such as 0.05.")
    if args.keep_fraction == 1 and args.ranker_weights is not None:
        raise ConfigError("--ranker-weights without --keep-fraction: nothing is ranked. Give a fraction below 1.")
    return args


def warn_on_rank_zero() -> None:
    """Let warnings be seen once, and errors of all ranks."""
    rank = read_environment(os.environ, meet=False).rank
    logging.basicConfig(format="%(message)s", level=logging.WARNING if rank == 0 else logging.ERROR)


def asked_device(name: str | None) -> torch.device:
    """What --device says, by default this rank's GPU if there is one. Raises: ConfigError where there is no such."""
    return find_device(name or rank_device(read_environment(os.environ, meet=False)))


def asked_model(folder: Path, *conditions: str) -> ModelInfo:
    """What an exported model's config.json says. Raises: ConfigError where its condition is none of these."""
    info = read_info(folder)
    if info.transformer is None:
        raise ConfigError(f"{folder} holds an RQ-VAE alone. Give a folder that has an RQ-Transformer as well.")
    found = info.transformer.condition
    if found not in conditions:
        what = {"text": "captions", "class": "classes", "none": "pictures without condition"}
        raise ConfigError(
            f"{folder} draws {what[found]}, not {' or '.join(what[name] for name in conditions)}. Use "
            f"{_SCRIPTS[found]}, or another model."
        )
    return info


@contextmanager
def loaded(args: argparse.Namespace, device: torch.device) -> Iterator[ImageGenerator | None]:
    """The model of the command; where ranks share it, the first calls it, and the others get None when it is done."""
    asked = (args.model, device, DRAWING_DTYPES[args.dtype], args.batch_size)
    if args.tp == 1:
        yield ImageGenerator.from_pretrained(*asked)
    else:
        with shared_generator(*asked, args.tp) as generator:
            yield generator


def draw_items(args: argparse.Namespace, info: ModelInfo, items: Sequence[Item], make_ranker: MakeRanker) -> None:
    """Draw a set as the options say, together with whoever else does, and tell how it ended.

    make_ranker is called where candidates are ranked.
    """
    environment = read_environment(os.environ, meet=False)
    number, workers = worker_place(os.environ, environment) if args.tp == 1 else (0, 1)
    device = asked_device(args.device)
    threads = args.threads if device.type == "cpu" else 0
    if device.type == "cpu":
        if threads < 1:
            raise ConfigError(f"--threads {threads}: use 1 or more, and as many as before to go on with a set.")
        torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = True  # another rank, or another run, would choose other sums
    settings = drawing_settings(
        args.model,
        info,
        items,
        seed=args.seed,
        sampling=vars(args),
        batch_size=args.batch_size,
        dtype=args.dtype,
        threads=threads,
        pictures_per_tar=args.pictures_per_tar,
        keep_fraction=args.keep_fraction,
        tp=args.tp,
    )
    places = lay_out(items, settings)
    rank = None
    if args.keep_fraction < 1:
        rank = make_ranker(args.ranker_weights, device)
        settings = replace(settings, ranker={"network": rank.network, "sha256": rank.sha256})
    pictures = begin_set(args.output, settings, places)
    if args.tp == 1 and len(pictures.done()) == len(pictures.files):
        complete = pictures.finish()
    else:
        with loaded(args, device) as generator:
            if generator is None:
                return
            shown = environment.rank == 0
            complete = draw_pictures(
                generator, items, pictures, rank=rank, number=number, workers=workers, progress=shown
            )
    if complete:
        tars = "" if settings.pictures_per_tar is None else f" in {len(pictures.files)} tars"
        print(f"{args.output}: {len(items)} pictures{tars}, complete")
    elif environment.rank == 0:
        print(f"nothing left to begin in {args.output}: other workers hold the rest, and the last of them completes it")
