"""Adversarial training: the discriminator, its optimiser, and what it makes of the generator's loss.

The discriminator is small: it is whole on every rank, in fp32, and outside DeepSpeed's engine. Of each micro-batch:

    f = reconstruction, as a leaf       D(f) serves both networks: its weights move only after the micro-batches
    image  = d(reconstruction + perceptual)/df,   g = dG/df,   G = -mean D(f)
    lambda = |image at the last layer| / (|g there| + 1e-4), both averaged over the data-parallel ranks
    the engine goes backward from image + lambda * weight * g at its reconstruction, and from the commitment loss
    the discriminator's gradients add up in one flat buffer

and then, once the engine has stepped, the flat buffer is averaged over the ranks and the discriminator steps.
Shapes: B batch, R resolution.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megarq.checkpoint.format import Checkpoint, Fragment
from megarq.config.run import RQVAERunConfig
from megarq.engine.fragments import MOMENTS
from megarq.engine.passes import PlainPasses, Terms
from megarq.engine.schedule import learning_rate, run_length
from megarq.errors import CheckpointError
from megarq.parallel.topology import ProcessGroups, TensorGroup
from megarq.rqvae.discriminator import DISCRIMINATOR_LOSSES, Discriminator, generator_loss
from megarq.rqvae.losses import RQVAELoss, adaptive_weight, last_layer_gradient
from megarq.rqvae.model import RQVAE, RQVAEOutput


class Adversary:
    """The discriminator in training."""

    name = "discriminator"
    """What its tensors' names begin with in a checkpoint."""
    terms = (
        *("generator_loss", "adaptive_weight", "discriminator_loss", "logits_real", "logits_fake"),
        "discriminator_grad_norm",
    )

    def __init__(
        self, model: RQVAE, config: RQVAERunConfig, samples: int, groups: ProcessGroups, device: torch.device
    ) -> None:
        """A new discriminator of the images that `model`, on any device, reconstructs; the same on all ranks.

        `samples` are those of an epoch, for lengths given in epochs.
        """
        loss, train, topology = config.loss, config.train, groups.topology
        self._loss, self._length = loss, run_length(train, samples)
        self._train = replace(train, lr=loss.discriminator_lr or train.lr)
        self._group, self._ranks = groups.data, topology.dp
        self._discriminator_loss = DISCRIMINATOR_LOSSES[loss.adversarial]
        self.discriminator = Discriminator(
            config.model.image_channels,
            loss.discriminator_channels,
            loss.discriminator_layers,
            train.seed,
            TensorGroup(groups.data, topology.data_rank, topology.dp),
        ).to(device)
        self._flat = _flatten(self.discriminator)
        self._optimizer = torch.optim.Adam([self._flat], lr=train.lr, betas=(train.betas[0], train.betas[1]))
        self._moments: dict[str, Tensor] = {kind: torch.zeros_like(self._flat) for kind in MOMENTS}
        self._optimizer.state[self._flat] = {"step": torch.tensor(0.0), **self._moments}
        self._step, self._micro_batches = 0, 0
        self._last_layer, self._hidden = model.decoder.conv_out, torch.empty(0)
        self._last_layer.register_forward_pre_hook(self._keep_hidden)

    @property
    def active(self) -> bool:
        """Whether this step of the run has the adversarial terms."""
        return self._step >= self._loss.discriminator_start

    @property
    def _updates(self) -> int:
        """How many the discriminator has had; its warm-ups count them."""
        return int(self._optimizer.state[self._flat]["step"])

    def losses(self, images: Tensor, output: RQVAEOutput, loss: RQVAELoss) -> Terms:
        """The losses of a micro-batch [B, 3, R, R], "loss" for the engine to go backward from; collective.

        The discriminator's gradients are added to those of the micro-batches before.
        """
        fake = output.reconstruction.detach().requires_grad_()
        terms = loss.terms(images, output._replace(reconstruction=fake))
        image_terms = [value for name, value in terms.items() if name != "commitment_loss"]
        logits_fake, logits_real = self.discriminator(fake), self.discriminator(images)
        generator = generator_loss(logits_fake)
        (image_gradient,) = torch.autograd.grad(torch.stack(image_terms).sum(), fake)
        (gradient,) = torch.autograd.grad(generator, fake, retain_graph=True)
        adaptive = self._adaptive_weight(image_gradient, gradient)
        discriminator = self._discriminator_loss(logits_real, logits_fake)
        weights = list(self.discriminator.parameters())
        torch.autograd.backward(self._loss.discriminator_weight * discriminator, inputs=weights)
        self._micro_batches += 1
        weight = adaptive * self._loss.adversarial_weight * self._warmth()
        terms |= {
            "generator_loss": generator,
            "adaptive_weight": adaptive,
            "discriminator_loss": discriminator,
            "logits_real": logits_real.mean(),
            "logits_fake": logits_fake.mean(),
        }
        value = torch.stack(image_terms).sum() + terms["commitment_loss"] + weight * generator
        # Its value is the loss, its gradient that of the terms above: VGG16 and the discriminator are behind it.
        pull = (output.reconstruction * (image_gradient + weight * gradient)).sum() + terms["commitment_loss"]
        return {"loss": value.detach() + pull - pull.detach(), **{k: v.detach() for k, v in terms.items()}}

    @torch.no_grad()
    def step(self) -> Terms:
        """Move the discriminator, once the engine has made a step; its gradient's norm, if it moves (collective)."""
        terms: Terms = {}
        if self._micro_batches:
            gradient = self._flat.grad
            assert gradient is not None
            dist.all_reduce(gradient, group=self._group)
            gradient /= self._micro_batches * self._ranks
            norm = terms["discriminator_grad_norm"] = gradient.norm()
            if self._train.clip:
                gradient *= (self._train.clip / (norm + 1e-6)).clamp(max=1)
            joined = self._step - self._updates
            self._optimizer.param_groups[0]["lr"] = learning_rate(self._step, *self._length, self._train, joined)
            self._optimizer.step()
            gradient.zero_()
        self._step, self._micro_batches = self._step + 1, 0
        return terms

    def take_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Start from a state dict, such as a released discriminator's. Raises CheckpointError where it differs."""
        theirs, ours = (
            {name: str(list(tensor.shape)) for name, tensor in state.items()}
            for state in (weights, self.discriminator.state_dict())
        )
        differing = [
            f"{name} is {theirs.get(name, 'missing')} there, {ours.get(name, 'missing')} here"
            for name in sorted(ours.keys() | theirs)
            if theirs.get(name) != ours.get(name)
        ]
        if differing:
            raise CheckpointError(
                f"the discriminator to start from is not of this run's layers: {'; '.join(differing[:5])}. "
                "Set loss.discriminator_layers and loss.discriminator_channels to its own."
            )
        self.discriminator.load_state_dict(weights)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, keyed "<kind>/<name>"; the same on all ranks, and no copies."""
        tensors: dict[str, Tensor] = {}
        offset = 0
        for name, parameter in self.discriminator.named_parameters():
            tensors[f"param/{self.name}.{name}"] = parameter.data
            for kind, moment in self._moments.items():
                tensors[f"{kind}/{self.name}.{name}"] = moment[offset:][: parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        for name, buffer in self.discriminator.named_buffers():
            tensors[f"buffer/{self.name}.{name}"] = buffer
        return tensors

    def metadata(self) -> dict[str, Any]:
        """Updates that its optimiser has made."""
        return {"discriminator_step": self._updates}

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint; one of a run that had no discriminator yet leaves the new one as it is.

        Raises CheckpointError where it holds another discriminator.
        """
        self._step = checkpoint.metadata["step"]
        if "discriminator_step" not in checkpoint.metadata:
            return
        for key, target in self.tensors().items():
            kind, _, name = key.partition("/")
            place = Fragment(tuple(target.shape))
            target.copy_(checkpoint.read(name, kind, place, target.numel()).view(target.shape))
        self._optimizer.state[self._flat]["step"].fill_(checkpoint.metadata["discriminator_step"])

    def _keep_hidden(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if layer.training and self.active:
            self._hidden = inputs[0].detach()

    def _adaptive_weight(self, image_gradient: Tensor, gradient: Tensor) -> Tensor:
        """lambda, from the reconstruction's gradients [B, 3, R, R]; collective."""
        hidden, self._hidden = self._hidden, torch.empty(0)
        weight = self._last_layer.weight
        both = torch.stack([last_layer_gradient(hidden, each, weight) for each in (image_gradient, gradient)])
        dist.all_reduce(both, group=self._group)
        return adaptive_weight(*(both / self._ranks))

    def _warmth(self) -> float:
        """How much of its weight the generator's loss has, rising from 0 to 1 once the discriminator has joined."""
        return min(1.0, (self._updates + 1) / max(1, self._loss.discriminator_warmup))


class AdversarialPasses(PlainPasses):
    """A DeepSpeedEngine around the generator, followed by a step of the discriminator."""

    def __init__(self, engine: Any, terms: Callable[[Any], Terms], adversary: Adversary) -> None:
        """`terms` runs the engine, and the adversary, on a micro-batch."""
        super().__init__(engine, terms)
        self._adversary = adversary

    def train(self, micro_batches: Sequence[Any], seeds: Sequence[int]) -> Terms:
        """One step of both optimisers."""
        return super().train(micro_batches, seeds) | self._adversary.step()


def _flatten(module: nn.Module) -> nn.Parameter:
    """All of a module's parameters in one, and their gradients in its own; each becomes a view into it."""
    parameters = list(module.parameters())
    flat = nn.Parameter(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, data, gradient in zip(parameters, flat.data.split(sizes), flat.grad.split(sizes), strict=True):
        parameter.data, parameter.grad = data.view_as(parameter), gradient.view_as(parameter)
    return flat
