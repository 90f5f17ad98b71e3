"""The walk, once for the session: 48 small pictures through every command to an exported model.

    pictures/, pictures.csv  ->  shards/  ->  tokenizer.json, tokenizer.model, rqvae/, codes/
                             ->  run/  ->  model/, grid.png

The RQ-VAE trains on one process without a launcher, the RQ-Transformer on two ranks under DeepSpeed's, with what a
large run uses: bf16, activation checkpointing, moving average. Tests read the walk's folders and copy what they change.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from tiny_training import write_tiny_training

from megarq.inference.pretrained import load_rqvae, save_rqvae
from tests.end_to_end.commands import refusal, succeed, typed

COLOURS = ("red", "green", "blue", "white")
SHAPES = ("square", "disc", "cross")
SIDE = 16
COPIES = 4

RQVAE = {
    "architecture": "rq-vae",
    "model": {
        "resolution": SIDE,
        "channels": 32,
        "channel_multipliers": [1, 1, 1],
        "res_blocks": 1,
        "attention_resolutions": [],
        "latent_channels": 8,
        "codebook_dim": 8,
        "codebook_size": 64,
        "depth": 2,
    },
    "loss": {"perceptual_weight": 0.0, "adversarial_weight": 0.0},
    "train": {"steps": 8, "global_batch_size": 16, "lr": 2e-3, "precision": "fp32"},
    "data": {"transform": "none", "workers": 0},
    "log": {"validate_every": 4, "sample_every": 4, "sample_count": 4},
}
RQTRANSFORMER = {
    "architecture": "rq-transformer",
    "model": {
        "code_shape": [4, 4, 2],
        "codebook_size": 64,
        "codebook_dim": 8,
        "embed_dim": 32,
        "body": {"layers": 1, "heads": 2},
        "head": {"layers": 1, "heads": 2},
        "cond_length": 6,
        "cond_vocab_size": 64,
    },
    "train": {"steps": 4, "global_batch_size": 16, "lr": 1e-2, "precision": "fp32"},
    "data": {"workers": 0, "validation_shards": 1, "bpe_dropout": 0.1},
    "checkpoint": {"every": 2, "keep": 0},
    "log": {"console_every": 1, "validate_every": 2, "sample_every": 2, "sample_count": 4},
}
CHANGES = (
    "train.precision=bf16",
    "train.ema_decay=0.5",
    "train.activation_checkpointing=true",
    "data.workers=1",
    "log.sample_prompts=[a red disc, a blue cross]",
)
SEED = 5
ASKED = ("--prompt", "a red disc", "--prompt", "blue cross", "--count", "2", "--top-k", "16", "--top-p", "0.9")


class Walk(NamedTuple):
    """Where everything lies."""

    folder: Path
    said: dict[str, str]
    """What the making of the codes and the training on two ranks printed."""

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def shards(self) -> str:
        """Pattern of the image shards."""
        return str(self.folder / "shards" / "*.tar")

    @property
    def train(self) -> tuple[object, ...]:
        """Options of a small RQ-Transformer's training on one process, but for --output."""
        codes, tokenizer = self / "codes", self / "tokenizer.json"
        return ("--model", self / "rqtransformer.yaml", "--data", codes, "--tokenizer", tokenizer)


def draw(folder: Path) -> None:
    """Pictures of every colour and shape at four sizes, and their table: two captions each, the shape as class."""
    (folder / "pictures").mkdir()
    with (folder / "pictures.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption", "label"])
        for colour in COLOURS:
            for label, shape in enumerate(SHAPES):
                for size in range(COPIES):
                    name = f"{colour}-{shape}-{size}.png"
                    _picture(colour, shape, 2 + size).save(folder / "pictures" / name)
                    table.writerows([name, caption, label] for caption in (f"a {colour} {shape}", f"{colour} {shape}"))


def _picture(colour: str, shape: str, margin: int) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), "black")
    pen, box = ImageDraw.Draw(picture), (margin, margin, SIDE - margin, SIDE - margin)
    if shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "disc":
        pen.ellipse(box, fill=colour)
    else:
        pen.line(box, fill=colour, width=2)
        pen.line((margin, SIDE - margin, SIDE - margin, margin), fill=colour, width=2)
    return picture


@pytest.fixture(scope="session")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """The whole walk, by the commands of the README."""
    made = Walk(tmp_path_factory.mktemp("walk"), {})
    draw(made.folder)
    for name, content in (("rqvae.yaml", RQVAE), ("rqtransformer.yaml", RQTRANSFORMER)):
        (made / name).write_text(yaml.safe_dump(content), encoding="utf-8")
    pictures = ("--images", made / "pictures", "--captions", made / "pictures.csv")
    typed("tools/make_shards.py", *pictures, "--output", made / "shards", "--samples-per-shard", 16)
    for name in ("tokenizer.json", "tokenizer.model"):
        wanted = ("--vocab-size", 64, "--output", made / name)
        typed("tools/train_text_tokenizer.py", "--data", made.shards, *wanted)
    stage1 = ("--model", made / "rqvae.yaml", "--data", made.shards, "--validation-data", made / "shards" / "00002.tar")
    succeed("megarq/train_rqvae.py", "--ds_config", "zero1.json", *stage1, "--output", made / "rqvae")
    frozen = ("--rqvae", made / "rqvae", "--data", made.shards, "--transform", "none")
    codes = succeed("tools/pretokenize.py", *frozen, "--output", made / "codes", "--draws", 2, "--latents")
    stage2 = ("--ds_config", "zero3.json", *made.train, "--output", made / "run", *CHANGES)
    run = typed("megarq/train.py", *stage2, ranks=2)
    succeed("tools/export.py", made / "run", "--output", made / "model", "--weights", "ema")
    succeed("tools/sample.py", made / "model", *ASKED, "--seed", SEED, "--output", made / "grid.png")
    return made._replace(said={"codes": codes.printed, "run": run})


@pytest.fixture(scope="session")
def train(walk: Walk, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`train(*options)`: the message of an RQ-Transformer's training that is refused; later options win."""
    new = tmp_path_factory.mktemp("refused") / "run"

    def refused(*options: object) -> str:
        return refusal("megarq/train.py", "--ds_config", "zero1.json", *walk.train, "--output", new, *options)

    return refused


@pytest.fixture(scope="session")
def other_codes(walk: Walk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes of the same pictures and shape from another RQ-VAE, argmin alone."""
    folder = tmp_path_factory.mktemp("other")
    rqvae = load_rqvae(walk / "rqvae")
    with torch.no_grad():
        rqvae.quant_conv.weight.mul_(1.25)
    save_rqvae(rqvae, folder / "rqvae")
    frozen = ("--rqvae", folder / "rqvae", "--data", walk.shards, "--transform", "none")
    succeed("tools/pretokenize.py", *frozen, "--output", folder / "codes", "--draws", 0)
    return folder / "codes"


@pytest.fixture(scope="session")
def tiny_training(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What megarq/train.py is given, but for --ds_config and --output."""
    return write_tiny_training(tmp_path_factory.mktemp("training"))
