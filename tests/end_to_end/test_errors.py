"""What a user can get wrong before training: one clear error from the real command line, status 2, no traceback."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.commands import call_ranks, error_of, refusal, succeed
from tests.end_to_end.conftest import CHANGES, Walk


@pytest.fixture(scope="module")
def train_rqvae(walk: Walk, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`train_rqvae(*options)`: the message of an RQ-VAE's training that is refused."""
    files = ("--model", walk / "rqvae.yaml", "--data", walk.shards)
    new = tmp_path_factory.mktemp("refused") / "run"
    return lambda *options: refusal("megarq/train_rqvae.py", *files, "--output", new, *options)


@pytest.fixture
def pretokenize(walk: Walk, tmp_path: Path) -> Callable[..., str]:
    """`pretokenize(*options)`: the message of an encoding of image shards that is refused."""
    given = ("--rqvae", walk / "rqvae", "--output", tmp_path / "refused", "--transform", "none")
    return lambda *options: refusal("tools/pretokenize.py", *given, *options)


# Configuration


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("model.embed_dmi=64", ["unknown key model.embed_dmi (command line)", "Did you mean model.embed_dim?"]),
        ("train.lr=fast", ["train.lr=fast (command line)", "expected a number"]),
        ("train.precision=fp8", ["train.precision='fp8'", "use bf16 or fp32"]),
        ("train.micro_batch_size=5", ["train.micro_batch_size=5", "does not divide", "Use a divisor of 16"]),
        ("parallel.tp=2", ["parallel.tp=2", "does not divide the 1 ranks", "Start a multiple of 2 ranks"]),
        ("parallel.pp=2", ["parallel.pp=2", "does not divide the 1 ranks"]),
        ("model.body.heads=3", ["model.body.heads=3 does not divide model.embed_dim=32", "Choose a divisor"]),
        ("model.code_shape=[2,2,2]", ["codes of shape (4, 4, 2)", "expects (2, 2, 2)", "Choose the model that fits"]),
        ("model.codebook_size=128", ["codebooks of (64, 64)", "(128, 128)", "pretokenize with its RQ-VAE"]),
        ("model.codebook_dim=16", ["the RQ-VAE's codebook is [64, 8], the model's [64, 16]", "set model.codebook"]),
        ("model.cond_vocab_size=20", ["has 48 tokens, model.cond_vocab_size is 20", "Set model.cond_vocab_size=48"]),
        ("objective.temperature=0.7", ["drawn at temperature 0.5", "is 0.7", "Set objective.temperature=0.5"]),
        ("objective.targets=best", ["objective.targets='best'", "use draws, argmin or soft"]),
        ("data.validation_shards=3", ["data.validation_shards=3", "has 3 shards", "Hold out fewer"]),
    ],
)
def test_an_option_that_cannot_be_run_is_refused(train, option, parts):
    message = train(option)
    assert all(part in message for part in parts), message


def test_an_unknown_key_in_a_model_file_is_refused(walk, train, tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text((walk / "rqtransformer.yaml").read_text().replace("embed_dim", "embeding_dim"))
    message = train("--model", path)
    assert f"unknown key model.embeding_dim ({path}). Did you mean model.embed_dim?" in message


def test_a_misspelt_model_name_is_answered_with_the_nearest(train):
    message = train("--model", "t2i-3.8b")
    assert "t2i-3.8b: no such file" in message and "Did you mean t2i-3.9b?" in message


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"zero_optimisation": {"stage": 1}}, ["unknown key zero_optimisation", "Did you mean zero_optimization?"]),
        ({"zero_optimization": {"stagee": 1}}, ["unknown key zero_optimization.stagee", "Did you mean stage?"]),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}},
            ["unknown key zero_optimization.offload_optimizer.devise", "device?"],
        ),
        ({"train_batch_size": 99}, ["ds_config says train_batch_size=99", "train.global_batch_size gives 16"]),
        ({"bf16": {"enabled": True}}, ["ds_config says bf16.enabled=true", "gives false", '"auto"']),
        ({"gradient_clipping": 0.25}, ["gradient_clipping=0.25", "train.clip gives 1.0", "Change one of them"]),
        ({"optimizer": {"type": "Lamb"}}, ["optimizer.type='Lamb'", "trains with AdamW", "Remove the section"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler is not taken from ds_config", "Use train.schedule"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_ds_config_that_cannot_be_run_is_refused(train, tmp_path, content, parts):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    message = train("--ds_config", path)
    assert all(part in message for part in parts), message


def test_pipelines_with_zero_3_are_refused_with_what_to_use(walk, tmp_path):
    options = ("--ds_config", "zero3.json", *walk.train, "--output", tmp_path / "run", "parallel.pp=2")
    outcomes = call_ranks("megarq/train.py", *options, ranks=2)
    message = error_of(outcomes[0])
    assert "parallel.pp=2 with ZeRO stage 3: DeepSpeed pipelines allow stages 0 and 1." in message
    assert "Use --ds_config zero1.json or parallel.pp=1." in message


def test_heads_that_tensor_parallelism_does_not_divide_are_refused(walk, tmp_path):
    options = ("--ds_config", "zero1.json", *walk.train, "--output", tmp_path / "run", "parallel.tp=2")
    outcomes = call_ranks("megarq/train.py", *options, "model.body.heads=1", ranks=2)
    assert "model.body.heads=1 is not divisible by parallel.tp=2. Choose a tp that divides it." in error_of(outcomes[0])


def test_a_batch_that_ranks_cannot_share_is_refused_by_rank_0_alone(walk, tmp_path):
    options = ("--ds_config", "zero1.json", *walk.train, "--output", tmp_path / "run", "train.global_batch_size=15")
    first, second = call_ranks("megarq/train.py", *options, ranks=2)
    message = error_of(first)
    assert "train.global_batch_size=15 is not divisible by the 2 data-parallel ranks. Use a multiple of 2." in message
    assert (second.status, second.errors) == (2, "")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--ds_config", "zero3.json"], ["ZeRO stage 3 for an RQ-VAE", "Use --ds_config zero1.json or zero2.json"]),
        (
            ["loss.perceptual_weight=1", "--perceptual-weights", "nowhere.pth"],
            ["nowhere.pth (--perceptual-weights) does not exist", "download.pytorch.org/models/vgg16-397923af.pth"],
        ),
        (
            ["loss.perceptual_weight=1", "model.resolution=8"],
            ["loss.perceptual_weight=1.0 with model.resolution=8", "LPIPS needs 16", "Set loss.perceptual_weight=0"],
        ),
        (
            ["loss.adversarial_weight=0.75", "loss.discriminator_layers=3"],
            ["loss.discriminator_layers=3 with model.resolution=16", "below 24", "Use fewer layers"],
        ),
        (["train.compile=true"], ["train.compile=true", "none of", "Remove it"]),
        (
            ["train.activation_checkpointing=true"],
            ["train.activation_checkpointing=true", "none of", "Use a smaller train.micro_batch_size"],
        ),
        (["loss.adversarial=wgan"], ["loss.adversarial='wgan'", "use hinge or vanilla"]),
        (["loss.discriminator_lr=0"], ["loss.discriminator_lr=0", "above 0"]),
        (["data.transform=centre"], ["unknown transform 'centre'", "Use one of"]),
        (["model.resolution=18"], ["model.resolution=18", "Use a multiple of 4"]),
    ],
)
def test_an_rqvae_that_cannot_be_trained_is_refused(train_rqvae, options, parts):
    message = train_rqvae(*options)
    assert all(part in message for part in parts), message


# Image shards


def test_a_missing_image_shard_stops_every_reader(walk, train_rqvae, pretokenize, tmp_path):
    pattern = str(walk / "shards" / "{00000..00003}.tar")
    for message in (
        train_rqvae("--data", pattern),
        pretokenize("--data", pattern),
        refusal("tools/train_text_tokenizer.py", "--data", pattern, "--output", tmp_path / "t.json"),
    ):
        assert f"missing shard '{walk / 'shards' / '00003.tar'}'" in message
        assert "Check the path" in message


@pytest.mark.parametrize("size", [5000, 10240])
def test_a_truncated_image_tar_is_one_bad_sample_too_many(walk, train_rqvae, pretokenize, tmp_path, size):
    shards = shutil.copytree(walk / "shards", tmp_path / "shards")
    assert size < (shards / "00001.tar").stat().st_size
    os.truncate(shards / "00001.tar", size)
    for message in (train_rqvae("--data", shards), pretokenize("--data", shards)):
        assert "1 truncated shard" in message and "00001.tar" in message and "Copy or make them again" in message


def test_more_bad_pictures_than_accepted_stop_the_encoding(walk, pretokenize, tmp_path):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for name in ("a.png", "b.png"):
            info = tarfile.TarInfo(name)
            info.size = 20
            tar.addfile(info, io.BytesIO(b"no picture at all..."))
    message = pretokenize("--data", walk.shards, tmp_path / "bad.tar")
    assert "2 bad samples of 50 seen, above the accepted rate of 0.01" in message and "--max-bad-rate" in message


# Code shards


@pytest.fixture
def codes(walk: Walk, tmp_path: Path) -> Path:
    """A copy of the code shards, to be damaged."""
    return shutil.copytree(walk / "codes", tmp_path / "codes")


def test_a_truncated_code_shard_is_refused(train, codes):
    size = (codes / "000001.tar").stat().st_size
    os.truncate(codes / "000001.tar", size - 1000)
    message = train("--data", codes)
    assert f"code shard {codes / '000001.tar'} has {size - 1000} bytes, the manifest says {size}" in message
    assert "Copy it again" in message


def test_a_missing_code_shard_is_refused(train, codes):
    (codes / "000001.tar").unlink()
    message = train("--data", codes)
    assert f"missing code shard {codes / '000001.tar'}" in message and "tools/pretokenize.py" in message


def test_a_missing_manifest_is_refused(train, codes):
    (codes / "manifest.json").unlink()
    message = train("--data", codes)
    assert f"{codes} holds no manifest.json" in message and "tools/pretokenize.py" in message


def test_a_code_folder_with_another_rqvae_inside_is_refused(train, codes, other_codes):
    for name in ("config.json", "rqvae.safetensors"):
        shutil.copy(other_codes / name, codes / name)
    assert f"{codes} holds codes of the RQ-VAE" in train("--data", codes)


def test_a_code_folder_with_the_weights_of_another_rqvae_is_refused(train, codes, other_codes):
    shutil.copy(other_codes / "rqvae.safetensors", codes / "rqvae.safetensors")
    assert "rqvae.safetensors has the fingerprint" in train("--data", codes)


def test_a_run_does_not_go_on_with_codes_of_another_rqvae(walk, train, other_codes, tmp_path):
    run = shutil.copytree(walk / "run", tmp_path / "run")
    argmin = ("objective.targets=argmin", *CHANGES, "train.steps=6")
    message = train("--data", other_codes, "--output", run, *argmin)
    assert f"{other_codes} holds codes of the RQ-VAE" in message and "Pretokenize with this RQ-VAE" in message


def test_validation_data_of_another_rqvae_are_refused(train, other_codes):
    message = train("--validation-data", other_codes, "data.validation_shards=0", "objective.targets=argmin")
    assert f"{other_codes} holds codes of the RQ-VAE" in message and "Pretokenize with this RQ-VAE" in message


def test_encoding_into_a_folder_of_another_rqvae_is_refused(walk, other_codes, tmp_path):
    folder = shutil.copytree(other_codes, tmp_path / "codes")
    frozen = ("--rqvae", walk / "rqvae", "--data", walk.shards, "--transform", "none", "--draws", 0)
    message = refusal("tools/pretokenize.py", *frozen, "--output", folder)
    assert "was begun with fingerprint=" in message and "another --output" in message


def test_draws_that_are_not_stored_are_missed(train, other_codes):
    message = train("--data", other_codes, "objective.targets=draws")
    assert "objective.targets=draws" in message and "Set objective.targets=argmin" in message


def test_latents_that_are_not_stored_are_missed(train, other_codes):
    message = train("--data", other_codes, "objective.targets=soft")
    assert "holds no latents" in message and "Pretokenize with --latents" in message


def test_latents_that_validation_data_lack_are_missed_before_training(walk, train, codes, tmp_path):
    shutil.rmtree(codes)
    frozen = ("--rqvae", walk / "rqvae", "--data", walk.shards, "--transform", "none", "--draws", 1)
    succeed("tools/pretokenize.py", *frozen, "--output", codes)
    message = train("--validation-data", codes, "objective.targets=soft", "--output", tmp_path / "run")
    assert f"{codes} holds no latents" in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_refused_command_leaves_nothing_in_the_way_of_the_right_one(walk, train, other_codes, tmp_path):
    run = tmp_path / "run"
    assert "Pretokenize with --latents" in train("--data", other_codes, "--output", run, "objective.targets=soft")
    right = ("--ds_config", "zero1.json", *walk.train, "--output", run, "objective.targets=soft", "train.steps=1")
    succeed("megarq/train.py", *right)


def test_classes_that_the_model_does_not_have_are_refused(train):
    message = train("model.cond_length=1", "model.cond_vocab_size=2")
    assert "holds class 2, the model has 2 classes" in message and "Set model.cond_vocab_size" in message


# Tokenizers


def test_a_model_of_captions_needs_a_tokenizer(walk, tmp_path):
    given = ("--model", walk / "rqtransformer.yaml", "--data", walk / "codes", "--output", tmp_path / "run")
    assert "give --tokenizer tokenizer.json or tokenizer.model" in refusal("megarq/train.py", *given)


def test_a_tokenizer_that_is_not_there_is_refused(train, tmp_path):
    message = train("--tokenizer", tmp_path / "tokenizer.json")
    assert "no such tokenizer file. Train one with tools/train_text_tokenizer.py" in message


def test_a_run_does_not_go_on_with_another_tokenizer(walk, train, tmp_path):
    run = shutil.copytree(walk / "run", tmp_path / "run")
    other = tmp_path / "tokenizer.json"
    succeed("tools/train_text_tokenizer.py", "--data", walk.shards, "--vocab-size", 40, "--output", other)
    message = train("--tokenizer", other, "--output", run, *CHANGES)
    assert f"{run / 'tokenizer.json'} differs from {other}" in message
