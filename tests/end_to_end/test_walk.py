"""From captioned pictures to pictures drawn from captions, by the real commands: what each step leaves behind."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import megarq
from megarq.checkpoint.run_folder import checkpoint_at
from megarq.config.load import load_config
from megarq.data.code_shards import CodeShards
from megarq.data.faults import Faults
from megarq.data.image_shards import read_samples
from megarq.inference.pretrained import load_rqvae
from megarq.rqvae.model import fingerprint
from megarq.text.tokenizer import TextTokenizer
from tests.end_to_end.commands import call, succeed
from tests.end_to_end.conftest import ASKED, CHANGES, SEED, Walk

STEP_FIELDS = [
    *("step", "loss", "image_loss", "caption_loss", "grad_norm", "lr", "images_per_second", "mfu", "step_seconds"),
    *("data_seconds", "memory_gib", "samples_seen", "epoch", "lost_samples", "lost_in_epoch"),
    *("checkpoint_stall_seconds", "restarts", "time"),
    *(f"ranks_{name}" for name in ("step_seconds", "data_seconds", "memory_gib", "probe_seconds")),
]


def lines(run: Path) -> list[dict]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def steps(run: Path) -> list[dict]:
    return [line for line in lines(run) if "loss" in line]


def grids(run: Path) -> list[int]:
    """Steps whose sample grid stands in TensorBoard."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Images("pictures")]


def pixels(picture: Image.Image | Path) -> np.ndarray:
    return np.asarray(Image.open(picture) if isinstance(picture, Path) else picture)


# Image shards, tokenizers


def test_image_shards_hold_every_picture_with_its_captions_and_class(walk: Walk):
    faults = Faults(0.0)
    samples = {
        sample.key: sample
        for shard in range(3)
        for sample in read_samples(str(walk / f"shards/{shard:05d}.tar"), faults)
    }
    assert len(samples) == 48
    assert samples["red-disc-0"].captions == ["a red disc", "red disc"] and samples["red-disc-0"].label == 1


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_tokenizers_read_captions_they_were_trained_on(walk: Walk, name: str):
    tokenizer = TextTokenizer.load(walk / name)
    assert tokenizer.decode(tokenizer.encode("a red disc", 8)) == "a red disc"


# RQ-VAE, code shards


def test_the_rqvae_learns_and_is_validated(walk: Walk):
    losses = [line["loss"] for line in steps(walk / "rqvae")]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert [line["step"] for line in lines(walk / "rqvae") if "validation_loss" in line] == [4, 8]


def test_the_rqvae_shows_reconstructions_in_tensorboard(walk: Walk):
    assert grids(walk / "rqvae") == [4, 8]


def test_codes_are_the_rqvaes_and_hold_what_was_asked_for(walk: Walk):
    settings = CodeShards.open(walk / "codes").settings
    assert (settings.draws, settings.latent_shape) == (2, (4, 4, 8))
    assert settings.fingerprint == fingerprint(load_rqvae(walk / "rqvae")) == fingerprint(load_rqvae(walk / "codes"))


def test_pretokenize_prints_the_perplexity_of_q(walk: Walk):
    assert "perplexity of Q at temperature 0.5, depth 1 to 2: " in walk.said["codes"]


# RQ-Transformer, on two ranks


def test_metrics_have_the_named_fields_at_every_step(walk: Walk):
    assert [line["step"] for line in steps(walk / "run")] == [1, 2, 3, 4]
    told = [[name for name in line if name != "checkpoint_seconds"] for line in steps(walk / "run")]
    assert told == [STEP_FIELDS] * 4


def test_validation_has_lines_of_its_own(walk: Walk):
    validations = [line for line in lines(walk / "run") if "loss" not in line]
    assert [line["step"] for line in validations] == [2, 4]
    assert all(line["validation_loss"] > 0 for line in validations)


def test_training_lowers_the_loss(walk: Walk):
    losses = [line["loss"] for line in steps(walk / "run")]
    assert losses[-1] < losses[0]


def test_two_ranks_shared_each_batch_under_zero_3(walk: Walk):
    assert "dp 2, tp 1, pp 1, ZeRO-3, bf16" in walk.said["run"]
    assert [line["samples_seen"] for line in steps(walk / "run")] == [16, 32, 48, 64]


def test_the_console_line_tells_progress(walk: Walk):
    assert "step 4/4 | loss " in walk.said["run"]
    assert all(part in walk.said["run"] for part in (" img/s | ", "| grad ", "| lr ", "| mem ", "| eta "))


def test_sample_grids_stand_in_tensorboard(walk: Walk):
    assert grids(walk / "run") == [2, 4]


def test_the_resolved_configuration_is_that_of_the_run(walk: Walk):
    asked = load_config(str(walk / "rqtransformer.yaml"), CHANGES, "rq-transformer")
    assert load_config(str(walk / "run" / "config.resolved.yaml")) == asked


def test_a_two_rank_run_goes_on_alone_under_another_stage(walk: Walk, tmp_path: Path):
    run = shutil.copytree(walk / "run", tmp_path / "run")
    command = ("--ds_config", "zero1.json", *walk.train, "--output", run, *CHANGES, "train.steps=6")
    printed = succeed("megarq/train.py", *command).printed
    assert "going on from step 4" in printed
    assert [line["step"] for line in steps(run)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_left_as_it_is(walk: Walk, tmp_path: Path):
    run = shutil.copytree(walk / "run", tmp_path / "run")
    printed = succeed("megarq/train.py", *walk.train, "--output", run, *CHANGES).printed
    assert "already at step 4, nothing to do" in printed
    assert lines(run) == lines(walk / "run")


# Export


def test_the_exported_folder_holds_all_and_nothing_else(walk: Walk):
    names = {"config.json", "model.safetensors", "rqvae.safetensors", "tokenizer.json", "README.md"}
    assert {path.name for path in (walk / "model").iterdir()} == names


def test_the_exported_weights_are_the_moving_average(walk: Walk):
    checkpoint = checkpoint_at(walk / "run")
    exported = load_file(walk / "model" / "model.safetensors")
    assert json.loads((walk / "model" / "config.json").read_text())["weights"] == "ema"
    assert all(torch.equal(exported[name], checkpoint.tensor(name, "ema")) for name in checkpoint.names())


def test_the_last_steps_weights_of_an_earlier_step_can_be_exported_in_half(walk: Walk, tmp_path: Path):
    options = ("--weights", "param", "--step", 2, "--dtype", "bf16")
    succeed("tools/export.py", walk / "run", "--output", tmp_path / "model", *options)
    checkpoint = checkpoint_at(walk / "run", 2)
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(exported[name], checkpoint.tensor(name).bfloat16()) for name in checkpoint.names())


def test_the_exported_rqvae_encodes_as_the_trained_one(walk: Walk, tmp_path: Path):
    succeed("tools/export.py", walk / "rqvae", "--output", tmp_path / "rqvae")
    again = ("--rqvae", tmp_path / "rqvae", "--data", walk.shards, "--transform", "none", "--draws", 2, "--latents")
    succeed("tools/pretokenize.py", *again, "--output", tmp_path / "codes")
    for shard in ("000000.tar", "000001.tar", "000002.tar"):
        assert (tmp_path / "codes" / shard).read_bytes() == (walk / "codes" / shard).read_bytes()


# Pictures


def test_the_same_seed_gives_the_same_png(walk: Walk, tmp_path: Path):
    succeed("tools/sample.py", walk / "model", *ASKED, "--seed", SEED, "--output", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (walk / "grid.png").read_bytes()


def test_another_seed_gives_other_pictures(walk: Walk, tmp_path: Path):
    succeed("tools/sample.py", walk / "model", *ASKED, "--seed", SEED + 1, "--output", tmp_path / "other.png")
    assert not np.array_equal(pixels(tmp_path / "other.png"), pixels(walk / "grid.png"))


def test_python_draws_the_pictures_of_the_grid_from_a_folder_moved_elsewhere(walk: Walk, tmp_path: Path):
    folder = shutil.copytree(walk / "model", tmp_path / "elsewhere")
    generator = megarq.ImageGenerator.from_pretrained(folder, device="cpu", dtype=torch.float32)
    pictures = generator.generate(prompts=["a red disc", "blue cross"], count=2, top_k=16, top_p=0.9, seed=SEED)
    grid = pixels(walk / "grid.png")
    corners = [(2 + 18 * row, 2 + 18 * column) for row in range(2) for column in range(2)]
    for picture, (top, left) in zip(pictures, corners, strict=True):
        assert np.array_equal(pixels(picture), grid[top : top + 16, left : left + 16])


# Other runs on the same codes: one process, four steps each

VARIANTS = {
    "argmin": ["objective.targets=argmin"],
    "draws": ["objective.targets=draws"],
    "soft": ["objective.targets=soft", "objective.temperature=0.25"],
    "class": ["model.cond_length=1", "model.cond_vocab_size=3"],
    "unconditional": ["model.cond_length=1", "model.cond_vocab_size=1"],
    "sentencepiece": [],
    "accumulation": ["train.micro_batch_size=4"],
}
ASKING = {"class": ["--class", "2"], "unconditional": []}


@pytest.fixture(scope="module")
def runs(walk: Walk, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each variant."""
    folder, ran = tmp_path_factory.mktemp("runs"), {}
    for name, changes in VARIANTS.items():
        kind = "model" if name == "sentencepiece" else "json"
        tokenizer = [] if name in ASKING else ["--tokenizer", walk / f"tokenizer.{kind}"]
        data = ("--model", walk / "rqtransformer.yaml", "--data", walk / "codes", *tokenizer)
        ran[name] = folder / name
        options = ["model.dropout=0", "data.bpe_dropout=0", *changes]
        succeed("megarq/train.py", "--ds_config", "zero1.json", *data, "--output", ran[name], *options)
    return ran


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_learns_is_validated_and_shown(runs: dict[str, Path], name: str):
    losses = [line["loss"] for line in steps(runs[name])]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert [line["step"] for line in lines(runs[name]) if "validation_loss" in line] == [2, 4]
    assert grids(runs[name]) == [2, 4]


@pytest.mark.parametrize("name", ["class", "unconditional", "sentencepiece", "soft"])
def test_variant_is_exported_and_sampled(runs: dict[str, Path], tmp_path: Path, name: str):
    succeed("tools/export.py", runs[name], "--output", tmp_path / "model")
    asking = ASKING.get(name, ["--prompt", "a red disc"])
    succeed("tools/sample.py", tmp_path / "model", *asking, "--count", 2, "--output", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (38, 20)


def test_targets_are_of_three_kinds(runs: dict[str, Path]):
    first = {name: steps(runs[name])[0]["image_loss"] for name in ("argmin", "draws", "soft")}
    assert len(set(first.values())) == 3


def test_accumulated_micro_batches_give_the_losses_of_whole_batches(runs: dict[str, Path]):
    whole, parts = ([line["loss"] for line in steps(runs[name])] for name in ("draws", "accumulation"))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_the_caption_loss_of_a_caption_free_model_is_null(runs: dict[str, Path]):
    assert all(line["caption_loss"] is None for name in ASKING for line in steps(runs[name]))


def test_help_ends_well_and_shows_an_example():
    outcome = call("megarq/train.py", "--help")
    assert outcome.status == 0 and "deepspeed megarq/train.py --ds_config zero3.json" in outcome.printed
