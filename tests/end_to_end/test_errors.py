"""What goes wrong stops with one clear sentence and exit status 2, before anything is damaged."""

import json
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.commands import Outcome, call
from tests.end_to_end.conftest import Walk


def refused(outcome: Outcome, *parts: str) -> None:
    """The command ended with status 2 and one error message that holds all parts, and no traceback."""
    assert outcome.status == 2, f"status {outcome.status}:\n{outcome.printed}\n{outcome.errors}"
    assert "Traceback" not in outcome.errors
    message = outcome.errors[outcome.errors.index("error: ") :]
    assert all(part in message for part in parts), message


def cut(path: Path, share: float = 0.5) -> None:
    """Cut a file short."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def altered(walk: Walk, folder: str, target: Path) -> Path:
    """A copy of one of the walk's folders, to be damaged."""
    shutil.copytree(walk / folder, target)
    return target


@pytest.fixture(scope="module")
def other_codes(walk: Walk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The codes of another RQ-VAE of the same shape."""
    folder = tmp_path_factory.mktemp("other")
    stage1 = ("--model", walk / "rqvae.yaml", "--data", walk.shards, "train.steps=2", "train.seed=9")
    assert call("megarq/train_rqvae.py", *stage1, "--output", folder / "rqvae").status == 0
    frozen = ("--rqvae", folder / "rqvae", "--data", walk.shards, "--transform", "none", "--draws", 2)
    assert call("tools/pretokenize.py", *frozen, "--output", folder / "codes").status == 0
    return folder / "codes"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("model.heds=4", ("unknown key model.heds",)),
        ("trian.lr=1e-3", ("unknown key trian", "train.lr")),
        ("train.lr=fast", ("train.lr", "fast")),
        ("model.dropout=1.5", ("model.dropout=1.5", "up to, but not including, 1")),
        ("train.global_batch_size=0", ("train.global_batch_size=0", "above 0")),
        ("train.micro_batch_size=5", ("train.micro_batch_size=5", "divisor of 16")),
        ("parallel.tp=2", ("parallel.tp=2", "1 ranks")),
        ("parallel.pp=2", ("parallel.pp=2",)),
        ("model.body.heads=5", ("model.body.heads=5", "model.embed_dim=32")),
        ("model.code_shape=[8,8,2]", ("(4, 4, 2)", "(8, 8, 2)", "model.code_shape")),
        ("model.cond_vocab_size=40", ("model.cond_vocab_size is 40", "smaller tokenizer")),
        ("objective.temperature=0.25", ("temperature 0.5", "objective.temperature=0.5")),
        ("objective.targets=hard", ("objective.targets='hard'", "draws, argmin or soft")),
        ("data.validation_shards=3", ("data.validation_shards=3", "Hold out fewer")),
    ],
)
def test_a_wrong_value_of_a_key(walk: Walk, tmp_path: Path, change: str, parts: tuple[str, ...]):
    refused(call("megarq/train.py", *walk.train, "--output", tmp_path / "run", change), *parts)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("ds", "parts"),
    [
        ({"zero_optimisation": {"stage": 3}}, ("zero_optimisation", "zero_optimization")),
        ({"zero_optimization": {"stage": 3, "overlap_com": True}}, ("zero_optimization.overlap_com", "overlap_comm")),
        ({"train_batch_size": 7}, ("train_batch_size=7", "train.global_batch_size", "16")),
        ({"bf16": {"enabled": True}}, ("bf16.enabled", "train.precision")),
        ({"fp16": {"enabled": True}}, ("fp16", "train.precision")),
    ],
)
def test_a_wrong_key_or_contradiction_in_ds_config(walk: Walk, tmp_path: Path, ds: dict, parts: tuple[str, ...]):
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    options = ("--ds_config", tmp_path / "ds.json", "--output", tmp_path / "run")
    refused(call("megarq/train.py", *walk.train, *options), *parts)


def test_a_misspelt_model_and_one_of_the_other_stage(tmp_path: Path):
    options = ("--data", "x", "--output", tmp_path / "run")
    refused(call("megarq/train.py", "--model", "cc3m-645m", *options), "cc3m-645m", "Did you mean cc3m-654m?")
    refused(call("megarq/train.py", "--model", "rqvae-demo", *options), "rq-vae", "train.py")


def test_a_missing_image_shard(walk: Walk, tmp_path: Path):
    options = ("--rqvae", walk / "rqvae", "--data", str(walk / "shards" / "{00000..00007}.tar"))
    refused(call("tools/pretokenize.py", *options, "--output", tmp_path / "codes"), "missing shard", "00003.tar")


def test_a_truncated_image_tar(walk: Walk, tmp_path: Path):
    shards = altered(walk, "shards", tmp_path / "shards")
    cut(shards / "00001.tar")
    options = ("--rqvae", walk / "rqvae", "--data", shards / "*.tar", "--transform", "none")
    refused(call("tools/pretokenize.py", *options, "--output", tmp_path / "codes"), "00001.tar")
    assert not (tmp_path / "codes" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda codes: (codes / "000001.tar").unlink(), ("000001.tar",)),
        (lambda codes: cut(codes / "000001.tar"), ("000001.tar", "bytes")),
        (lambda codes: (codes / "manifest.json").unlink(), ("manifest.json", "pretokenize")),
        (lambda codes: cut(codes / "manifest.json"), ("manifest.json",)),
        (lambda codes: cut(codes / "rqvae.safetensors"), ("rqvae.safetensors",)),
    ],
    ids=["missing shard", "truncated shard", "missing manifest", "truncated manifest", "truncated RQ-VAE"],
)
def test_damaged_codes(walk: Walk, tmp_path: Path, damage, parts: tuple[str, ...]):
    codes = altered(walk, "codes", tmp_path / "codes")
    damage(codes)
    options = ("--model", walk / "rqtransformer.yaml", "--data", codes, "--tokenizer", walk / "tokenizer.json")
    refused(call("megarq/train.py", *options, "--output", tmp_path / "run"), *parts)


def test_codes_of_another_rqvae_for_validation_and_for_a_run_that_goes_on(
    walk: Walk, tmp_path: Path, other_codes: Path
):
    options = ("--output", tmp_path / "new", "--validation-data", other_codes)
    refused(call("megarq/train.py", *walk.train, *options), "codes of the RQ-VAE", "other pictures")
    run = altered(walk, "run", tmp_path / "run")
    codes = ("--data", other_codes, "--output", run, "train.steps=6")
    refused(call("megarq/train.py", *walk.train, *codes), "RQ-VAE")


def test_a_run_whose_rqvae_was_swapped_is_not_exported(walk: Walk, tmp_path: Path, other_codes: Path):
    run = altered(walk, "run", tmp_path / "run")
    for name in ("config.json", "rqvae.safetensors"):
        shutil.copyfile(other_codes / name, run / "rqvae" / name)
    refused(call("tools/export.py", run, "--output", tmp_path / "model"), "RQ-VAE", "trained on")
    assert not (tmp_path / "model").exists()


def test_draws_or_latents_that_are_not_there(walk: Walk, tmp_path: Path, other_codes: Path):
    options = ("--data", other_codes, "--output", tmp_path / "run", "objective.targets=soft")
    refused(call("megarq/train.py", *walk.train, *options), "latents", "objective.targets=draws")


def test_captions_without_a_tokenizer_and_a_damaged_one(walk: Walk, tmp_path: Path):
    options = ("--model", walk / "rqtransformer.yaml", "--data", walk / "codes", "--output", tmp_path / "run")
    refused(call("megarq/train.py", *options), "give --tokenizer")
    shutil.copyfile(walk / "tokenizer.json", tmp_path / "tokenizer.json")
    cut(tmp_path / "tokenizer.json")
    refused(call("megarq/train.py", *options, "--tokenizer", tmp_path / "tokenizer.json"), "tokenizer.json")


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: cut(step / "rank-00001.safetensors"),
        lambda step: (step / "rank-00000.safetensors").unlink(),
        lambda step: (step / "metadata.json").unlink(),
    ],
    ids=["cut short", "missing file", "unfinished"],
)
def test_a_damaged_checkpoint_is_neither_resumed_nor_exported(walk: Walk, tmp_path: Path, damage):
    run = altered(walk, "run", tmp_path / "run")
    damage(run / "checkpoints" / "step-00000004")
    refused(call("megarq/train.py", *walk.train, "--output", run, "train.steps=6"), "step-00000004")
    refused(call("tools/export.py", run, "--output", tmp_path / "model"), "step-00000004")


def test_a_folder_that_holds_a_run_of_another_model(walk: Walk, tmp_path: Path):
    run = altered(walk, "run", tmp_path / "run")
    changed = call("megarq/train.py", *walk.train, "--output", run, "model.body.layers=2")
    refused(changed, "model.body", "Give another --output")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("loss.perceptual_weight=1",), ("loss.perceptual_weight=1",)),
        (("loss.adversarial_weight=0.75",), ("loss.adversarial_weight=0.75",)),
        (("--ds_config", "zero3.json"), ("stage 3", "zero1.json")),
        (("parallel.pp=2",), ("parallel.pp=2",)),
    ],
)
def test_what_stage_1_does_not_do(walk: Walk, tmp_path: Path, options: tuple[str, ...], parts: tuple[str, ...]):
    stage1 = ("--model", walk / "rqvae.yaml", "--data", walk.shards, "--output", tmp_path / "rqvae")
    refused(call("megarq/train_rqvae.py", *stage1, *options), *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--class", "1"), ("classes", "--prompt")),
        (("--prompt", ""), ("prompt ''",)),
        (("--prompt", "a disc", "--top-k", "0"), ("top_k=0",)),
        (("--prompt", "a disc", "--top-p", "1.5"), ("top_p=1.5",)),
        (("--prompt", "a disc", "--temperature", "nan"), ("temperature=nan",)),
        (("--prompt", "a disc", "--top-k", "4,4,4"), ("3 values for 2 depths",)),
    ],
)
def test_what_a_model_cannot_be_asked_for(walk: Walk, tmp_path: Path, options: tuple[str, ...], parts):
    refused(call("tools/sample.py", walk / "model", *options, "--output", tmp_path / "grid.png"), *parts)
