"""The adversarial terms of ranks that share a batch are those that plain autograd makes of the joined batch."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_runs import CPU
from tiny_stage1_runs import BATCH, global_images, tiny_stage1
from torch import Tensor, nn

from megarq.config.run import RQVAERunConfig
from megarq.engine.adversary import Adversary
from megarq.parallel.topology import ProcessGroups, TensorGroup, Topology
from megarq.rqvae.discriminator import (
    DISCRIMINATOR_LOSSES,
    Discriminator,
    SharedBatchNorm2d,
    generator_loss,
)
from megarq.rqvae.losses import RQVAELoss
from megarq.rqvae.model import RQVAE

DISCRIMINATOR_LR = 4e-3
PERCEPTUAL = nn.L1Loss()
"""In place of LPIPS, which would take most of the time."""


def own_share(batch: Tensor) -> Tensor:
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def over_ranks(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over the ranks."""
    means = {name: value.detach().clone() for name, value in values.items()}
    for value in means.values():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return means


def normalized() -> None:
    """SharedBatchNorm2d on a share of two batches, against nn.BatchNorm2d on all of them."""
    size = dist.get_world_size()
    ours, theirs = SharedBatchNorm2d(6, TensorGroup(dist.group.WORLD, dist.get_rank(), size)), nn.BatchNorm2d(6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(torch.linspace(0.5, 2, 6))
            norm.bias.copy_(torch.linspace(-1, 1, 6))
    for _ in range(2):
        batch = torch.randn(8, 6, 5, 5, generator=generator) * 3 + torch.arange(6.0)[:, None, None] * 10
        gradient = torch.randn(8, 6, 5, 5, generator=generator)
        mine, whole = own_share(batch).clone().requires_grad_(), batch.clone().requires_grad_()
        mine_out, whole_out = ours(mine), theirs(whole)
        torch.testing.assert_close(mine_out, own_share(whole_out), rtol=1e-5, atol=1e-5)
        mine_out.backward(own_share(gradient))
        whole_out.backward(gradient)
        torch.testing.assert_close(mine.grad, own_share(whole.grad), rtol=1e-5, atol=1e-5)
    for name in ("weight", "bias"):
        total = over_ranks({name: getattr(ours, name).grad})[name] * size
        torch.testing.assert_close(total, getattr(theirs, name).grad, rtol=1e-5, atol=1e-4)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(getattr(ours, name), buffer)
    torch.testing.assert_close(ours.eval()(batch), theirs.eval()(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shared_batch_norm_is_torchs_on_the_joined_batch(rank_group, ranks):
    rank_group(ranks).run(normalized)


def by_hand(model: RQVAE, judge: Discriminator, images: Tensor, config: RQVAERunConfig, warmth: float) -> Any:
    """Terms of the joined batch, gradients of the model's parameters and of the discriminator's, by autograd alone."""
    loss = config.loss
    output = model(images)
    reconstruction = nn.functional.mse_loss(output.reconstruction, images)
    perceptual = loss.perceptual_weight * PERCEPTUAL(output.reconstruction, images)
    real, fake = judge(images), judge(output.reconstruction)
    generator, last = generator_loss(fake), model.decoder.conv_out.weight
    pair = [torch.autograd.grad(term, last, retain_graph=True)[0] for term in (reconstruction + perceptual, generator)]
    adaptive = pair[0].norm() / (pair[1].norm() + 1e-4)
    commitment = loss.commitment_weight * output.commitment_loss
    total = reconstruction + perceptual + commitment + warmth * loss.adversarial_weight * adaptive * generator
    discriminator = DISCRIMINATOR_LOSSES[loss.adversarial](real, judge(output.reconstruction.detach()))
    terms = {
        "loss": total,
        "reconstruction_loss": reconstruction,
        "perceptual_loss": perceptual,
        "commitment_loss": commitment,
        "generator_loss": generator,
        "adaptive_weight": adaptive,
        "discriminator_loss": discriminator,
        "logits_real": real.mean(),
        "logits_fake": fake.mean(),
    }
    gradients = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
    theirs = torch.autograd.grad(loss.discriminator_weight * discriminator, list(judge.parameters()))
    named = zip(dict(model.named_parameters()), gradients, strict=True)
    return terms, dict(named), dict(zip(dict(judge.named_parameters()), theirs, strict=True))


def adversarial_step(adversarial: str) -> None:
    """One step of an Adversary without an engine, against the same by hand."""
    options = {"adversarial": adversarial, "discriminator_start": 0, "discriminator_warmup": 4}
    options |= {"discriminator_lr": DISCRIMINATOR_LR, "perceptual_weight": 2.0}
    config = tiny_stage1(1, loss=options, clip=0.01, warmup_steps=2)
    torch.manual_seed(0)
    model = RQVAE(config.model).train()
    model.quantizer.eval()  # the codebook stays for the second forward pass
    groups = ProcessGroups.build(Topology(dist.get_world_size(), dist.get_rank()))
    adversary = Adversary(model, config, BATCH, groups, CPU)
    judge = Discriminator(filters=config.loss.discriminator_channels, seed=config.train.seed)
    terms, gradients, judged = by_hand(model, judge, global_images(0), config, warmth=0.25)

    images = own_share(global_images(0))
    loss = RQVAELoss(perceptual=PERCEPTUAL, perceptual_weight=config.loss.perceptual_weight)
    ours = adversary.losses(images, model(images), loss)
    ours["loss"].backward()
    for name, value in over_ranks(ours).items():
        torch.testing.assert_close(value, terms[name].detach(), rtol=1e-5, atol=1e-6, msg=name)
    assert ours.keys() == terms.keys()
    for name, value in over_ranks({name: p.grad for name, p in model.named_parameters()}).items():
        torch.testing.assert_close(value, gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    for name, value in over_ranks({name: p.grad for name, p in adversary.discriminator.named_parameters()}).items():
        torch.testing.assert_close(value, judged[name], rtol=1e-4, atol=1e-6, msg=name)

    for parameter, gradient in zip(judge.parameters(), judged.values(), strict=True):
        parameter.grad = gradient
    norm = nn.utils.clip_grad_norm_(judge.parameters(), config.train.clip)
    assert norm > config.train.clip
    torch.optim.Adam(judge.parameters(), DISCRIMINATOR_LR / 2, (0.5, 0.9)).step()
    torch.testing.assert_close(adversary.step(), {"discriminator_grad_norm": norm}, rtol=1e-4, atol=0)
    moments = adversary.tensors()
    for name, parameter in judge.named_parameters():
        torch.testing.assert_close(
            moments[f"exp_avg/discriminator.{name}"], 0.5 * parameter.grad, rtol=1e-4, atol=1e-7, msg=name
        )
        large = parameter.grad.abs() > 1e-5  # of smaller ones Adam makes steps of any size
        own = adversary.discriminator.get_parameter(name)
        torch.testing.assert_close(own[large], parameter[large], rtol=1e-4, atol=1e-5, msg=name)
        assert not own.grad.any()


@pytest.mark.parametrize("adversarial", ["hinge", "vanilla"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_terms_gradients_and_the_step_are_those_of_the_joined_batch(rank_group, ranks, adversarial):
    rank_group(ranks).run(adversarial_step, adversarial)


def accumulated(micro_batches: int) -> dict[str, Tensor]:
    """The discriminator's gradient of a batch in so many micro-batches, in evaluation mode: its statistics stay."""
    config = tiny_stage1(1, loss={"discriminator_start": 0}, clip=0.0)
    torch.manual_seed(0)
    model = RQVAE(config.model).train()
    model.quantizer.eval()
    adversary = Adversary(model, config, BATCH, ProcessGroups.build(Topology()), CPU)
    adversary.discriminator.eval()
    for images in global_images(0).chunk(micro_batches):
        adversary.losses(images, model(images), RQVAELoss())
    adversary.step()
    return {name: value.clone() for name, value in adversary.tensors().items() if name.startswith("exp_avg/")}


def test_micro_batches_add_up_to_the_gradient_of_the_batch(rank_group):
    whole, halves = (rank_group(1).run(accumulated, count)[0] for count in (1, 2))
    for name, value in whole.items():
        torch.testing.assert_close(halves[name], value, rtol=1e-4, atol=1e-7, msg=name)


def first_moves(start: int) -> float:
    """How far any weight goes in the first update of a discriminator that joins at this step; Adam's is the rate."""
    options = {"discriminator_start": start, "discriminator_lr": DISCRIMINATOR_LR}
    config = tiny_stage1(20, loss=options, warmup_steps=4, schedule="constant")
    model = RQVAE(config.model).train()
    adversary = Adversary(model, config, BATCH, ProcessGroups.build(Topology()), CPU)
    for _ in range(start):
        assert adversary.step() == {}
    before = {name: weight.clone() for name, weight in adversary.discriminator.named_parameters()}
    adversary.losses(global_images(0), model(global_images(0)), RQVAELoss())
    adversary.step()
    return max(
        float((weight - before[name]).abs().max()) for name, weight in adversary.discriminator.named_parameters()
    )


@pytest.mark.parametrize("start", [0, 2, 10])
def test_the_warmup_of_the_discriminators_rate_begins_when_it_joins(rank_group, start):
    assert rank_group(1).run(first_moves, start) == [pytest.approx(DISCRIMINATOR_LR / 4, rel=1e-3)]


def weights_taken(change: str, filters: int = 8) -> None:
    """An Adversary of 8 filters that starts from another's state dict, changed."""
    config = tiny_stage1(1)
    adversary = Adversary(RQVAE(config.model), config, BATCH, ProcessGroups.build(Topology()), CPU)
    state = Discriminator(filters=filters, seed=99).state_dict()
    if change:
        state[f"main.{change}"] = state.pop("main.3.weight")
    adversary.take_weights(state)
    for name, value in state.items():
        assert torch.equal(adversary.discriminator.state_dict()[name], value), name
    assert torch.equal(adversary.tensors()["param/discriminator.main.2.weight"], state["main.2.weight"])


def test_a_discriminator_starts_from_given_weights(rank_group):
    rank_group(1).run(weights_taken, "")


def test_a_discriminator_of_other_layers_is_refused(rank_group):
    told = r"main.3.weight is missing there, \[16\] here; main.9.weight is \[16\] there, missing here. Set loss.discrim"
    with pytest.raises(AssertionError, match=told):
        rank_group(1).run(weights_taken, "9.weight")


def test_a_discriminator_of_another_width_is_refused_with_both_shapes(rank_group):
    with pytest.raises(AssertionError, match=r"main.0.weight is \[4, 3, 4, 4\] there, \[8, 3, 4, 4\] here"):
        rank_group(1).run(weights_taken, "", 4)
