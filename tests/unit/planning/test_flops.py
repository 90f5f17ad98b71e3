from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from random_vgg import write_vgg
from torch.utils import module_tracker
from torch.utils.flop_counter import FlopCounterMode

from megarq.config.models import RQTransformerConfig, RQVAEConfig, StackConfig
from megarq.config.run import RQVAELossConfig, RQVAERunConfig
from megarq.engine.adversary import Adversary
from megarq.launch.environment import read_environment
from megarq.launch.process_group import joined
from megarq.parallel.topology import ProcessGroups, Topology
from megarq.planning.flops import rqvae_flops, rqvae_training_flops, training_flops, transformer_flops
from megarq.rqvae.losses import RQVAELoss
from megarq.rqvae.model import RQVAE
from megarq.rqvae.perceptual import LPIPS
from megarq.transformer.rq_transformer import RQTransformer

SMALL = RQTransformerConfig(
    code_shape=[3, 2, 4],
    codebook_size=17,
    codebook_dim=8,
    embed_dim=24,
    body=StackConfig(layers=3, heads=2),
    head=StackConfig(layers=2, heads=3),
    cond_length=5,
    cond_vocab_size=11,
)
VARIANTS = {
    "text": SMALL,
    "class": replace(SMALL, cond_length=1),
    "learned body": replace(SMALL, body_input="learned"),
    "classifier per depth": replace(SMALL, shared_classifier=False),
    "depth one": replace(SMALL, code_shape=[3, 2, 1], head=StackConfig(layers=0, heads=3)),
}
VAE = RQVAEConfig(
    resolution=16,
    channels=32,
    channel_multipliers=[1, 2],
    res_blocks=1,
    attention_resolutions=[8],
    latent_channels=8,
    codebook_dim=8,
    codebook_size=20,
    depth=3,
)


def transformer_inputs(config: RQTransformerConfig) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.zeros(1, *config.code_shape, dtype=torch.int64)
    return codes, torch.zeros(1, config.cond_length, dtype=torch.int64)


def initialized(config: RQTransformerConfig) -> RQTransformer:
    model = RQTransformer(config)
    model.initialize(0)
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_transformer_flops_are_those_that_torch_counts(name: str) -> None:
    config = VARIANTS[name]
    model = initialized(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*transformer_inputs(config))
    assert sum(transformer_flops(config).values()) == counter.get_total_flops()


def test_training_flops_are_close_to_those_that_torch_counts() -> None:
    """Torch leaves out the gradient of the frozen codebook, and adds recomputation inside attention's backward."""
    config = replace(SMALL, embed_dim=96)
    model = initialized(config)
    with FlopCounterMode(display=False) as counter:
        logits, caption = model(*transformer_inputs(config))
        (logits.sum() + caption.sum()).backward()
    assert training_flops(config) == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("resolutions", [[], [8], [16, 8]])
def test_rqvae_flops_are_those_that_torch_counts(resolutions: list[int]) -> None:
    config = replace(VAE, attention_resolutions=resolutions)
    model = RQVAE(config).eval()
    counts = {}
    images = torch.zeros(1, 3, 16, 16)
    with torch.no_grad():
        latents = model.encode(images)
        codes = model.quantize(latents)
        steps = {
            "encoder": lambda: model.encode(images),
            "quantizer": lambda: model.quantize(latents),
            "decoder": lambda: model.decode(codes),
        }
        for part, step in steps.items():
            with FlopCounterMode(display=False) as counter:
                step()
            counts[part] = counter.get_total_flops()
    assert rqvae_flops(config) == counts


def rqvae_run(**loss: Any) -> RQVAERunConfig:
    return RQVAERunConfig(model=VAE, loss=RQVAELossConfig(**{"perceptual_weight": 0, "adversarial_weight": 0, **loss}))


def test_rqvae_training_flops_are_close_to_those_that_torch_counts() -> None:
    model = RQVAE(VAE).train()
    with FlopCounterMode(display=False) as counter:
        output = model(torch.zeros(1, 3, 16, 16))
        (output.reconstruction.sum() + output.commitment_loss).backward()
    assert rqvae_training_flops(rqvae_run(), 1) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_flops_of_lpips_are_those_that_torch_counts(tmp_path: Path) -> None:
    loss, images = LPIPS(write_vgg(tmp_path)), torch.zeros(1, 3, 16, 16)
    with FlopCounterMode(display=False) as counter:
        loss(images.clone().requires_grad_(), images).backward()
    run, without = rqvae_run(perceptual_weight=1.0), rqvae_run()
    assert rqvae_training_flops(run, 1) - rqvae_training_flops(without, 1) == counter.get_total_flops()


@pytest.mark.parametrize("layers", [1, 2])
def test_flops_of_the_discriminator_are_those_that_torch_counts(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The counter attributes products to modules, by hooks that gradients of a leaf alone do not allow.
    monkeypatch.setattr(module_tracker, "register_multi_grad_hook", Mock())
    run = rqvae_run(adversarial_weight=0.75, discriminator_layers=layers, discriminator_channels=8)
    run.train.steps = 1
    model, images = RQVAE(VAE).train(), torch.zeros(1, 3, 16, 16)
    cpu = torch.device("cpu")
    with joined(read_environment({}), cpu):
        adversary = Adversary(model, run, run.train.global_batch_size, ProcessGroups.build(Topology()), cpu)
        output = model(images)
        with FlopCounterMode(display=False) as counter:
            adversary.losses(images, output, RQVAELoss())
    assert rqvae_training_flops(run, 1) - rqvae_training_flops(rqvae_run(), 1) == counter.get_total_flops()


def test_a_discriminator_costs_nothing_before_it_joins() -> None:
    run, without = rqvae_run(adversarial_weight=0.75, discriminator_start=5), rqvae_run()
    assert [rqvae_training_flops(run, step) > rqvae_training_flops(without, step) for step in (5, 6)] == [False, True]
