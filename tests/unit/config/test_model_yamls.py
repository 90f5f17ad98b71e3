from pathlib import Path

import pytest
import torch

from megarq.config.load import load_config
from megarq.config.names import CONFIGS
from megarq.data.transforms import TRANSFORMS
from megarq.planning.counts import rqvae_parameters, transformer_parameters
from megarq.rqvae.model import RQVAE
from megarq.transformer.rq_transformer import RQTransformer

TRANSFORMERS = {
    "ffhq-355m": 355_393_536,
    "church-370m": 370_087_936,
    "cat-612m": 612_061_184,
    "bedroom-612m": 612_061_184,
    "imagenet-480m": 480_921_088,
    "imagenet-821m": 820_899_328,
    "imagenet-1.4b": 1_387_529_728,
    "imagenet-3.8b": 3_822_488_064,
    "cc3m-654m": 654_061_568,
    "t2i-3.9b": 3_903_996_928,
}
RQVAES = {
    "rqvae-8x8x4": 104_402_051,
    "rqvae-ffhq-8x8x4": 100_732_035,
    "rqvae-church-8x8x4": 104_402_051,
    "rqvae-cat-8x8x4": 104_402_051,
    "rqvae-bedroom-8x8x4": 104_402_051,
    "rqvae-cc3m-8x8x4": 104_402_051,
}
STAGE_1 = {  # transform, epochs, epochs of warm-up
    "rqvae-8x8x4": ("imagenet", 10, 0.5),
    "rqvae-ffhq-8x8x4": ("ffhq", 150, 5),
    "rqvae-church-8x8x4": ("lsun", 1, 0),
    "rqvae-cat-8x8x4": ("lsun", 1, 0),
    "rqvae-bedroom-8x8x4": ("lsun", 1, 0),
    "rqvae-cc3m-8x8x4": ("t2i", 1, 0),
}
RQVAE_TRAINABLE = 100_207_491
TRAINING = {  # global batch, epochs, top-k (None: all), top-p
    "ffhq-355m": (128, 200, 250, 1.0),
    "church-370m": (256, 300, 250, 1.0),
    "cat-612m": (2048, 100, 250, 1.0),
    "bedroom-612m": (2048, 100, 250, 1.0),
    "imagenet-480m": (2048, 100, None, 0.92),
    "imagenet-821m": (2048, 100, None, 0.92),
    "imagenet-1.4b": (2048, 100, None, 0.92),
    "imagenet-3.8b": (2048, 100, None, 0.92),
    "cc3m-654m": (2048, 100, None, 0.7),
}


def transformer(name: str) -> RQTransformer:
    with torch.device("meta"):
        return RQTransformer(load_config(name, [], "rq-transformer").model)


def rqvae(name: str) -> RQVAE:
    with torch.device("meta"):
        return RQVAE(load_config(name, [], "rq-vae").model)


@pytest.mark.parametrize(("name", "parameters"), TRANSFORMERS.items())
def test_the_transformer_has_exactly_the_published_parameters(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in transformer(name).parameters() if p.requires_grad) == parameters


@pytest.mark.parametrize(("name", "parameters"), TRANSFORMERS.items())
def test_nothing_in_the_transformers_weights_is_frozen(name: str, parameters: int) -> None:
    assert sum(tensor.numel() for tensor in transformer(name).state_dict().values()) == parameters


@pytest.mark.parametrize("name", RQVAES)
def test_the_rqvae_trains_exactly_the_published_parameters(name: str) -> None:
    assert sum(p.numel() for p in rqvae(name).parameters() if p.requires_grad) == RQVAE_TRAINABLE


@pytest.mark.parametrize(("name", "parameters"), RQVAES.items())
def test_the_rqvae_with_its_codebook_has_the_published_total(name: str, parameters: int) -> None:
    model = rqvae(name)
    codebook = model.quantizer.codebook(0).weight
    assert sum(p.numel() for p in model.parameters()) + codebook.numel() == parameters


@pytest.mark.parametrize("name", [*TRANSFORMERS, "demo"])
def test_counting_the_transformer_by_formula_agrees(name: str) -> None:
    built = sum(p.numel() for p in transformer(name).parameters())
    assert transformer_parameters(load_config(name, [], "rq-transformer").model).total == built


@pytest.mark.parametrize("name", [*RQVAES, "rqvae-demo"])
def test_counting_the_rqvae_by_formula_agrees(name: str) -> None:
    model = rqvae(name)
    counts = rqvae_parameters(load_config(name, [], "rq-vae").model)
    codebook = model.quantizer.codebook(0).weight.numel()
    assert (counts.trainable_total, counts.frozen["codebook"]) == (sum(p.numel() for p in model.parameters()), codebook)


@pytest.mark.parametrize(("name", "expected"), TRAINING.items())
def test_batch_epochs_and_sampling_are_the_published_ones(name: str, expected: tuple[object, ...]) -> None:
    config = load_config(name, [], "rq-transformer")
    found = (config.train.global_batch_size, config.train.epochs, config.sampling.top_k, config.sampling.top_p)
    assert found == expected


@pytest.mark.parametrize(("name", "expected"), STAGE_1.items())
def test_pictures_and_epochs_of_stage_1_are_the_published_ones(name: str, expected: tuple[object, ...]) -> None:
    config = load_config(name, [], "rq-vae")
    assert (config.data.transform, config.train.epochs, config.train.warmup_epochs) == expected
    assert config.data.transform in TRANSFORMS
    train = config.train
    assert (train.lr, train.betas, train.weight_decay, train.global_batch_size) == (4e-5, [0.5, 0.9], 0.0, 128)


@pytest.mark.parametrize("name", STAGE_1)
def test_the_discriminators_schedule_is_the_published_one(name: str) -> None:
    loss = load_config(name, [], "rq-vae").loss
    assert (loss.adversarial, loss.adversarial_weight, loss.discriminator_weight) == ("hinge", 0.75, 0.75)
    assert (loss.discriminator_start, loss.discriminator_warmup, loss.discriminator_lr) == (0, 0, None)
    assert (loss.discriminator_layers, loss.discriminator_channels) == (2, 64)


@pytest.mark.parametrize("name", STAGE_1)
def test_what_takes_one_epoch_is_finetuned_from_imagenet_and_has_its_architecture(name: str) -> None:
    config = load_config(name, [], "rq-vae")
    assert config.finetuned_from == ("rqvae-8x8x4" if config.train.epochs == 1 else None)
    if config.finetuned_from:
        assert config.model == load_config(config.finetuned_from, [], "rq-vae").model


@pytest.mark.parametrize("name", TRAINING)
def test_the_published_optimiser_is_theirs(name: str) -> None:
    train = load_config(name).train
    found = (train.lr, train.betas, train.weight_decay, train.clip, train.schedule, train.warmup_steps)
    assert found == (5e-4, [0.9, 0.95], 1e-4, 1.0, "cosine", 0)


def test_the_largest_models_training_says_that_it_is_ours() -> None:
    assert "is ours" in (CONFIGS / "model" / "t2i-3.9b.yaml").read_text()


def test_the_demos_transformer_fits_the_demos_rqvae() -> None:
    codes, images = load_config("demo", [], "rq-transformer").model, load_config("rqvae-demo", [], "rq-vae").model
    assert (codes.code_shape, codes.sizes, codes.codebook_dim) == (
        list(images.code_shape),
        images.sizes,
        images.codebook_dim,
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml")))
def test_every_file_opens_with_what_it_is(name: str) -> None:
    assert (CONFIGS / "model" / f"{name}.yaml").read_text().startswith("# RQ-")


def test_the_demos_rqvae_fits_its_adversarial_sibling_as_the_docs_say():
    docs = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    typed = next(line for line in docs.splitlines() if "--output runs/rqvae-gan" in line)
    changes = [word for word in typed.split() if word.startswith("model.")]
    assert load_config("rqvae-demo-gan", changes).model == load_config("rqvae-demo").model
