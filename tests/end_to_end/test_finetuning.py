"""From a run of stage 1 to another data set and to the authors' layout and back, by the real commands."""

import io
from pathlib import Path

import lmdb
import pytest
import torch
from PIL import Image

from megarq.checkpoint.run_folder import checkpoint_at
from megarq.inference.pretrained import load_rqvae
from megarq.rqvae.model import fingerprint
from tests.end_to_end.commands import refusal, succeed
from tests.end_to_end.conftest import SIDE, Walk

TRAINING = (
    *("train.steps=1", "train.global_batch_size=8", "train.precision=fp32", "train.lr=1e-3", "data.workers=1"),
    *("data.transform=lsun", "loss.perceptual_weight=0", "loss.adversarial_weight=0"),
)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen WebP pictures in LMDB, as LSUN's."""
    folder = tmp_path_factory.mktemp("lsun") / "church_outdoor_train_lmdb"
    with lmdb.open(str(folder), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for number in range(12):
            buffer = io.BytesIO()
            Image.new("RGB", (SIDE + number, SIDE), (20 * number, 0, 90)).save(buffer, "WEBP")
            transaction.put(f"{number:040x}".encode(), buffer.getvalue())
    return folder


@pytest.fixture(scope="module")
def authors(walk: Walk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The walk's RQ-VAE in the authors' layout."""
    folder = tmp_path_factory.mktemp("authors") / "rqvae"
    succeed("tools/export.py", walk / "rqvae", "--layout", "authors", "--output", folder)
    return folder


def finetune(source: Path, data: Path, output: Path) -> str:
    start = ("--ds_config", "zero1.json", "--init-from", source, "--data", data, "--output", output)
    return succeed("megarq/train_rqvae.py", *start, *TRAINING).printed


def test_a_run_is_finetuned_on_lsuns_database(walk: Walk, database: Path, tmp_path: Path):
    said = finetune(walk / "rqvae", database, tmp_path / "run")
    assert f"first weights: {walk / 'rqvae' / 'checkpoints'}" in said
    assert f"RQ-VAE {fingerprint(load_rqvae(walk / 'rqvae'))[:12]}" in said
    before, after = checkpoint_at(walk / "rqvae"), checkpoint_at(tmp_path / "run")
    moved = (after.tensor("quant_conv.weight") - before.tensor("quant_conv.weight")).abs().max()
    assert 0 < moved < 2e-3  # Adam's first step


def test_the_authors_layout_is_finetuned_on_a_folder(walk: Walk, authors: Path, tmp_path: Path):
    said = finetune(authors, walk / "pictures", tmp_path / "run")
    assert f"first weights: {authors}, param weights, RQ-VAE {fingerprint(load_rqvae(walk / 'rqvae'))[:12]}" in said
    assert checkpoint_at(tmp_path / "run").metadata["step"] == 1


def test_the_authors_layout_is_read_back(walk: Walk, authors: Path, tmp_path: Path):
    succeed("tools/import_pretrained.py", "--rqvae", authors, "--output", tmp_path / "model")
    ours, again = load_rqvae(walk / "rqvae"), load_rqvae(tmp_path / "model")
    assert fingerprint(again) == fingerprint(ours)
    assert torch.equal(again.quantizer.codebook(0).embed_ema, ours.quantizer.codebook(0).embed_ema)


def test_a_model_of_both_stages_goes_to_the_authors_layout_and_back(walk: Walk, tmp_path: Path):
    theirs = tmp_path / "theirs"
    succeed("tools/export.py", walk / "model", "--layout", "authors", "--output", theirs)
    parts = ("--rqvae", theirs / "rqvae", "--rqtransformer", theirs / "rqtransformer")
    succeed(
        "tools/import_pretrained.py", *parts, "--tokenizer", theirs / "tokenizer.json", "--output", tmp_path / "model"
    )
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (
        walk / "model" / "model.safetensors"
    ).read_bytes()


def test_another_architecture_is_refused(walk: Walk, tmp_path: Path):
    start = ("--init-from", walk / "rqvae", "--data", walk.shards, "--output", tmp_path / "run", *TRAINING)
    message = refusal("megarq/train_rqvae.py", "--model", walk / "rqvae.yaml", *start, "model.depth=3")
    assert f"--init-from {walk / 'rqvae'} is another RQ-VAE: model.depth=3 (2 there)" in message
    assert not (tmp_path / "run" / "checkpoints").exists()
