"""Stage 1 from another RQ-VAE's weights, on a folder of pictures: what is taken over, what goes on, what is refused."""

import contextlib
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tiny_runs import CPU, metrics_of

from megarq.checkpoint.run_folder import checkpoint_at
from megarq.config.run import RQVAERunConfig
from megarq.data.image_sources import open_images
from megarq.data.images import ImageLoader
from megarq.engine.finetuning import InitFrom, config_of_source
from megarq.engine.rqvae_run import train_rqvae
from megarq.engine.session import Session
from megarq.engine.start import resolve_and_place
from megarq.errors import ConfigError, MegarqError
from megarq.inference.first_weights import read_first_weights
from megarq.rqvae.discriminator import Discriminator
from megarq.rqvae.model import RQVAE

REFERENCE = Path(__file__).parents[1] / "reference" / "rqvae"
BATCH = 4
STANDING_STILL = 1e-12
"""A learning rate with which a step moves a weight by as much."""
OVERRIDES = (
    "train.steps=1",
    f"train.global_batch_size={BATCH}",
    "train.precision=fp32",
    f"train.lr={STANDING_STILL}",
    "loss.perceptual_weight=0",
    "loss.discriminator_channels=8",
    "data.workers=0",
    "data.transform=none",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six pictures of 32x32, in two folders."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(6):
        (folder / f"n{number % 2}").mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"n{number % 2}" / f"{number}.png")
    return folder


@pytest.fixture
def source(tmp_path):
    """The reference's RQ-VAE, with a moving average and a discriminator in its file."""
    folder = shutil.copytree(REFERENCE, tmp_path / "source")
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    content = torch.load(folder / "model.pt", weights_only=True)
    average = {name: 2 * tensor if "conv" in name else tensor for name, tensor in content["state_dict"].items()}
    beside = {"state_dict_ema": average, "discriminator": Discriminator(filters=8, seed=11).state_dict()}
    torch.save(content | beside, folder / "model.pt")
    return folder


def finetune(run: Path, data: Path, init: InitFrom, overrides: tuple[str, ...] = ()) -> str:
    """What the command does once it has parsed its line without --model; returns what rank 0 said, or the error."""
    config = config_of_source(init, str(run), [*OVERRIDES, *overrides])
    return trained(run, data, init, config)


def trained(run: Path, data: Path, init: InitFrom | None, config: RQVAERunConfig) -> str:
    ds = {"zero_optimization": {"stage": 1}}
    resolved, topology = resolve_and_place(config, ds, dist.get_world_size(), dist.get_rank())
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            session = Session.open(config, resolved, topology, run, CPU)
            train_rqvae(session, [str(data)], [], lambda step: 1.0, init_from=init)
    except MegarqError as error:
        return f"{type(error).__name__}: {error}"
    return said.getvalue()


def without_source(run: Path, data: Path, source: Path, named: str | None, *overrides: str) -> str:
    """A run whose configuration finetunes a model of that name, and which is given none."""
    config = config_of_source(InitFrom(str(source)), str(run), [*OVERRIDES, *overrides])
    config.finetuned_from = named
    return trained(run, data, None, config)


def deeper(run: Path, data: Path, init: InitFrom) -> str:
    """The same with a --model of another depth."""
    config = config_of_source(init, str(run), OVERRIDES)
    config.model.depth = 2
    return trained(run, data, init, config)


@pytest.mark.parametrize(("weights", "factor"), [(None, 1), ("ema", 2)])
def test_two_ranks_start_from_the_source(rank_group, run, pictures, source, weights, factor):
    said = rank_group(2).run(finetune, run, pictures, InitFrom(str(source), weights))
    checkpoint, first = checkpoint_at(run), read_first_weights(source, weights)
    for name in checkpoint.names("param"):
        if not name.startswith("discriminator."):
            expect_same(checkpoint.tensor(name), first.state[name])
    expect_same(checkpoint.tensor("decoder.conv_out.bias"), factor * original()["decoder.conv_out.bias"])
    kind = weights or "param"
    assert f"first weights: {source}, {kind} weights, RQ-VAE " in said[0] and "with its discriminator" in said[0]


def expect_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for one step that stands still."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * STANDING_STILL)


def original() -> dict[str, torch.Tensor]:
    return torch.load(REFERENCE / "model.pt", weights_only=True)["state_dict"]


def test_the_codebook_goes_on_from_its_moving_averages(rank_group, run, pictures, source):
    rank_group(1).run(finetune, run, pictures, InitFrom(str(source)))
    first, checkpoint = read_first_weights(source), checkpoint_at(run)
    model = RQVAE(first.config, seed=0)
    model.load_state_dict(first.state)
    batch = next(iter(ImageLoader(open_images([str(pictures)]), "none", 32, BATCH, seed=0)))
    with torch.no_grad():
        model.train()(batch.images)
    for name in ("weight", "cluster_size_ema", "embed_ema"):
        name = f"quantizer.codebooks.0.{name}"
        assert torch.equal(checkpoint.tensor(name, "buffer"), model.state_dict()[name])
        assert not torch.equal(checkpoint.tensor(name, "buffer"), first.state[name])


def test_the_discriminator_is_the_sources(rank_group, run, pictures, source):
    rank_group(2).run(finetune, run, pictures, InitFrom(str(source)))
    theirs, checkpoint = Discriminator(filters=8, seed=11), checkpoint_at(run)
    for name, parameter in theirs.named_parameters():
        expect_same(checkpoint.tensor(f"discriminator.{name}"), parameter.detach())


def test_a_run_can_be_finetuned_with_its_discriminator(rank_group, tmp_path, pictures, source):
    rank_group(2).run(finetune, tmp_path / "first", pictures, InitFrom(str(source)), ("train.lr=1e-3",))
    said = rank_group(2).run(finetune, tmp_path / "second", pictures, InitFrom(str(tmp_path / "first")))
    first, second = checkpoint_at(tmp_path / "first"), checkpoint_at(tmp_path / "second")
    assert f"first weights: {first.folder}, param weights" in said[0]
    assert first.names("param") == second.names("param")
    for name in first.names("param"):
        expect_same(second.tensor(name), first.tensor(name))
    assert not torch.allclose(first.tensor("quant_conv.weight"), original()["quant_conv.weight"], atol=1e-4)


def test_a_run_that_goes_on_no_longer_needs_its_source(rank_group, run, pictures, source):
    init = InitFrom(str(source))
    rank_group(2).run(finetune, run, pictures, init)
    shutil.rmtree(source)
    said = rank_group(2).run(finetune, run, pictures, init, ("train.steps=2",))
    assert f"the run goes on from its own checkpoint: --init-from {source} is not read" in said[0]
    assert [line["step"] for line in metrics_of(run)] == [1, 2]


def test_a_finetuning_that_is_given_no_weights_warns_once(rank_group, run, pictures):
    first = rank_group(1).run(without_source, run, pictures, REFERENCE, "rqvae-8x8x4")[0]
    again = rank_group(1).run(without_source, run, pictures, REFERENCE, "rqvae-8x8x4", "train.steps=2")[0]
    assert "WARNING: the run starts from random weights, with a configuration that finetunes rqvae-8x8x4." in first
    assert "going on from step 1" in again and "WARNING" not in again


def test_a_run_that_finetunes_nothing_does_not_warn(rank_group, run, pictures):
    assert "WARNING" not in rank_group(1).run(without_source, run, pictures, REFERENCE, None)[0]


def test_another_architecture_is_refused_on_all_ranks(rank_group, run, pictures, source):
    answers = rank_group(2).run(deeper, run, pictures, InitFrom(str(source)))
    expected = f"--init-from {source} is another RQ-VAE: model.depth=2 (4 there)."
    assert all(answer.startswith(f"{ConfigError.__name__}: {expected}") for answer in answers)
    assert not (run / "checkpoints").exists()
