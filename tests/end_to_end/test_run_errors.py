"""Damaged or foreign runs, checkpoints and models: one clear error from the real command line, nothing overwritten."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.commands import refusal, succeed
from tests.end_to_end.conftest import CHANGES, Walk


@pytest.fixture(scope="module")
def class_model(walk: Walk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model of three classes."""
    folder = tmp_path_factory.mktemp("class")
    given = ("--model", walk / "rqtransformer.yaml", "--data", walk / "codes", "--output", folder / "run")
    classes = ("model.cond_length=1", "model.cond_vocab_size=3", "train.steps=1", "log.sample_every=0")
    succeed("megarq/train.py", "--ds_config", "zero1.json", *given, *classes)
    succeed("tools/export.py", folder / "run", "--output", folder / "model")
    return folder / "model"


@pytest.fixture
def run(walk: Walk, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return shutil.copytree(walk / "run", tmp_path / "run")


def resume(train: Callable[..., str], run: Path) -> str:
    return train("--output", run, *CHANGES, "train.steps=6")


def export(run: Path) -> str:
    message = refusal("tools/export.py", run, "--output", run.with_name("model"))
    assert not run.with_name("model").exists()
    return message


def cut_short(file: Path) -> str:
    os.truncate(file, file.stat().st_size - 100)
    return f"{file} has {file.stat().st_size} bytes, "


def remove(file: Path) -> str:
    file.unlink()
    return f"{file} is missing"


def change_a_byte(file: Path) -> str:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return f"{file} has the sha256"


def remove_metadata(file: Path) -> str:
    file.with_name("metadata.json").unlink()
    return f"{file.parent} has no metadata.json"


DAMAGES = [cut_short, remove, change_a_byte, remove_metadata]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_exported_with_a_warning(run, damage):
    problem = damage(run / "checkpoints" / "step-00000004" / "rank-00000.safetensors")
    said = succeed("tools/export.py", run, "--output", run.with_name("model"))
    assert "step 2, ema weights" in said.printed
    assert f"step-00000004 is passed over: {problem}" in said.errors


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_without_a_whole_checkpoint_is_neither_resumed_nor_exported(train, run, damage):
    for step in ("step-00000002", "step-00000004"):
        problem = damage(run / "checkpoints" / step / "rank-00000.safetensors")
    for message in (resume(train, run), export(run)):
        assert f"{run / 'checkpoints'} holds no whole checkpoint, of 2 ({problem}" in message
        assert "start again in another --output" in message


def test_the_folder_of_a_run_of_another_model_is_refused(train, run):
    message = train("--output", run, "model.embed_dim=64")
    assert f"--output {run} holds a run with model.embed_dim=32, this one has 64" in message
    assert "Give another --output" in message


def test_the_folder_of_a_run_of_another_network_is_refused(walk, train, tmp_path):
    run = shutil.copytree(walk / "rqvae", tmp_path / "rqvae")
    message = train("--output", run)
    assert f"--output {run} holds a run of an rq-vae" in message and "Give another --output" in message


def test_a_run_with_another_rqvae_inside_is_not_exported(run, other_codes):
    for name in ("config.json", "rqvae.safetensors"):
        shutil.copy(other_codes / name, run / "rqvae" / name)
    message = export(run)
    assert f"{run / 'rqvae'} is the RQ-VAE" in message and "Put the RQ-VAE of its code shards there" in message


def test_a_step_that_was_not_kept_is_not_exported(walk, tmp_path):
    message = refusal("tools/export.py", walk / "run", "--step", 3, "--output", tmp_path / "model")
    assert "the run keeps step-00000002, step-00000004" in message


def test_a_moving_average_that_was_not_kept_is_not_exported(walk, tmp_path):
    message = refusal("tools/export.py", walk / "rqvae", "--weights", "ema", "--output", tmp_path / "model")
    assert "keeps no moving average" in message and "use --weights param" in message


def test_a_folder_of_other_files_is_not_overwritten_by_an_export(walk, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    message = refusal("tools/export.py", walk / "run", "--output", tmp_path)
    assert "already holds notes.txt" in message and "give --output another folder" in message
    assert (tmp_path / "notes.txt").read_text() == "mine"


# Pictures


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--prompt", "a red disc"], ["prompts given", "classes (--class)"]),
        (["--class", "3"], ["class=3", "this model knows classes 0 to 2"]),
        ([], ["neither prompts nor classes given", "give classes (--class)"]),
    ],
)
def test_a_model_of_classes_is_asked_for_its_classes(class_model, tmp_path, options, parts):
    message = refusal("tools/sample.py", class_model, *options, "--output", tmp_path / "grid.png")
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--class", "1"], ["classes given", "prompts (--prompt)"]),
        (["--prompt", "x", "--top-k", "0"], ["top_k=0"]),
        (["--prompt", "x", "--top-p", "1.5"], ["top_p=1.5"]),
        (["--prompt", "x", "--temperature", "1,1,1"], ["3", "2"]),
        (["--prompt", "x", "--output", "grid.jpg"], ["--output grid.jpg", "ends in .png"]),
    ],
)
def test_a_model_of_captions_refuses_what_it_cannot_draw(walk, tmp_path, options, parts):
    message = refusal("tools/sample.py", walk / "model", "--output", tmp_path / "grid.png", *options)
    assert all(part in message for part in parts), message


def test_an_exported_model_cut_short_draws_nothing(walk, tmp_path):
    model = shutil.copytree(walk / "model", tmp_path / "model")
    os.truncate(model / "model.safetensors", 5000)
    message = refusal("tools/sample.py", model, "--prompt", "x", "--output", tmp_path / "grid.png")
    assert f"{model / 'model.safetensors'} cannot be read" in message and "Copy or export the folder again" in message


def test_a_run_is_not_an_exported_model(walk, tmp_path):
    message = refusal("tools/sample.py", walk / "run", "--prompt", "x", "--output", tmp_path / "grid.png")
    assert "is not an exported model. Make one with tools/export.py" in message
