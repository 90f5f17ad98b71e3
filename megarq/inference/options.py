"""Options that the commands which draw pictures share."""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from megarq.inference.export import DTYPES
from megarq.inference.generator import BATCH

DRAWING_DTYPES = {**DTYPES, "int8": torch.int8}
"""What --dtype may be in drawing: int8 is bf16, but for the linear layers' weights."""


def per_depth(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of one value, or of comma-separated values, one for each depth."""

    def parse(text: str) -> Any:
        values = [convert(part) for part in text.split(",")]
        return values[0] if len(values) == 1 else values

    parse.__name__ = f"{convert.__name__}[,{convert.__name__}..]"
    return parse


def add_sampling_options(
    arguments: argparse.ArgumentParser, top_k: int | None = None, top_p: float | None = None
) -> None:
    """--top-k, --top-p, --temperature, --guidance, --seed, --dtype, --batch-size and --tp; `top_k` and
    `top_p` are the defaults, None for the model's own."""
    theirs = "default: the model's"
    arguments.add_argument(
        "--top-k",
        type=per_depth(int),
        default=top_k,
        help=f"draw among the K likeliest codes; A,B,.. for each depth ({f'default: {top_k}' if top_k else theirs})",
    )
    arguments.add_argument(
        "--top-p",
        type=per_depth(float),
        default=top_p,
        help="draw among codes that hold this share of the probability; A,B,.. likewise "
        f"({f'default: {top_p}' if top_p else theirs})",
    )
    arguments.add_argument(
        "--temperature", type=per_depth(float), help=f"divides the logits; A,B,.. likewise ({theirs})"
    )
    arguments.add_argument(
        "--guidance",
        type=float,
        metavar="S",
        help=f"1 is none; more stresses the captions of a model that was trained with data.caption_dropout ({theirs})",
    )
    arguments.add_argument("--seed", type=int, default=0, help="same seed, same pictures (default: 0)")
    arguments.add_argument(
        "--dtype",
        choices=DRAWING_DTYPES,
        default="fp32",
        help="of the RQ-Transformer; bf16 also of the decoder; int8: linear layers in 8 bits, the rest in bf16 "
        "(default: fp32)",
    )
    arguments.add_argument(
        "--batch-size", type=int, default=BATCH, help="pictures drawn at once (default: %(default)s)"
    )
    arguments.add_argument(
        "--tp", type=int, default=1, metavar="N", help="share the model among the N ranks of the job (default: 1)"
    )
