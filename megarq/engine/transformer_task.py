"""What stage 2 does with a batch: losses, validation, and grids of sampled pictures.

Shapes: b samples, L condition length, H x W positions, D depth, K codebook size, P tensor-parallel size.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.utils import make_grid

from megarq.config.deepspeed import batch_sizes
from megarq.config.run import RQTransformerRunConfig
from megarq.data.loader import CodeBatch
from megarq.engine.lost_samples import LostSamples, same_for_peers
from megarq.engine.metrics import Findings
from megarq.engine.passes import Passes, PipelinePasses, PlainPasses
from megarq.engine.snapshot import whole_transformer
from megarq.inference.sampling import Guidance, sample_codes
from megarq.parallel.initialization import named_generator
from megarq.parallel.topology import ProcessGroups
from megarq.rqvae.model import RQVAE
from megarq.text.tokenizer import TextTokenizer
from megarq.transformer.loss import objective
from megarq.transformer.stages import Stage


class TransformerTask:
    """Image and caption loss of code stacks under a DeepSpeed engine around an RQTransformer."""

    terms = ("loss", "image_loss", "caption_loss")
    skippable = True

    def __init__(
        self,
        engine: Any,
        *,
        module: Stage,
        config: RQTransformerRunConfig,
        rqvae: RQVAE,
        tokenizer: TextTokenizer | None,
        validation: Callable[[], Iterable[CodeBatch]] | None,
        groups: ProcessGroups,
        device: torch.device,
        samples_per_epoch: int,
        sample_prompts: Sequence[str] = (),
    ) -> None:
        """`rqvae` is frozen, on `device`; `validation` starts a pass over this rank's share of the held-out samples.

        `module` is the engine's RQTransformer, or this rank's stage of it. `sample_prompts` are drawn where the
        configuration names none.
        """
        self._engine, self._module, self._config, self._rqvae = engine, module, config, rqvae
        self._tokenizer, self._validation = tokenizer, validation
        self._groups, self._device = groups, device
        self._sample_prompts = list(sample_prompts)
        self._lost = LostSamples(samples_per_epoch, config.data.max_lost_rate, groups, device)
        self.passes: Passes = PlainPasses(engine, self._terms)
        if groups.topology.pp > 1:
            names = [name for name in self.terms if name != "caption_loss" or config.model.condition == "text"]
            self.passes = PipelinePasses(engine, module, groups, self._example, self._objective, names)

    def micro_batches(self, batch: CodeBatch, count: int) -> list[CodeBatch]:
        """Equal parts of a rank's share, in order; what the model reads goes to the device once for all of them."""
        batch = same_for_peers(batch, self._groups, self._device)
        self._lost.add(batch, self._module.training)
        names = [field.name for field in fields(batch) if isinstance(getattr(batch, field.name), Tensor)]
        shares = {name: getattr(batch, name) for name in names}
        shares |= {
            name: shares[name].to(self._device, non_blocking=True)
            for name in ("codes", "cond", "weights", "latents")
            if name in shares
        }
        parts = [shares[name].chunk(count) for name in names]
        return [replace(batch, **dict(zip(names, part, strict=True))) for part in zip(*parts, strict=True)]

    def validate(self) -> dict[str, float] | None:
        """Mean losses over the held-out samples, each counted once."""
        if self._validation is None:
            return None
        sums: dict[str, Tensor] = {}
        count = torch.zeros((), device=self._device)
        for batch in self._validation():
            micro_batches = self.micro_batches(batch, batch_sizes(self._config.train, self._groups.topology.dp)[1])
            for micro, terms in zip(micro_batches, self.passes.evaluate(micro_batches), strict=True):
                kept = int(micro.weights.sum())
                count += kept
                for name, value in terms.items():
                    weighted = value.float() * kept
                    sums[name] = sums.get(name, torch.zeros_like(weighted)) + weighted
        values = torch.stack([*sums.values(), count])
        dist.all_reduce(values, group=self._groups.data)
        if values[-1] == 0:
            return None
        return {
            f"validation_{name}": value for name, value in zip(sums, (values[:-1] / values[-1]).tolist(), strict=True)
        }

    def observe(self, step: int, values: Mapping[str, Any]) -> Findings:
        """How many samples others stood in for, and warnings of what cannot be read.

        Raises: LostDataError, on all ranks, where more of an epoch are lost than `data.max_lost_rate`.
        """
        return self._lost.observe(values["epoch"])

    def pictures(self) -> tuple[Tensor, str] | None:
        """Pictures of a few prompts or classes, sampled with the configuration's settings."""
        model = whole_transformer(self._engine, self._module, self._groups, self._rqvae)
        if model is None:
            return None
        cond, text = self._shown_conditions()
        sampling = self._config.sampling
        guidance = None
        if self._tokenizer is not None:
            null = self._tokenizer.encode("", self._config.model.cond_length)
            guidance = Guidance(sampling.guidance, torch.tensor(null))
        codes = sample_codes(
            *(model, cond, sampling.top_k, sampling.top_p, sampling.temperature),
            seed=self._config.train.seed,
            guidance=guidance,
            captured=False,
        )
        images = self._rqvae.decode(codes).clamp(-1, 1).add(1).div(2)
        return make_grid(images.cpu(), nrow=max(1, round(len(images) ** 0.5))), text

    def _terms(self, batch: CodeBatch) -> dict[str, Tensor]:
        """The objective of a micro-batch, by the whole model."""
        (codes, cond), (targets, _, kept) = self._example(batch)
        return self._objective(self._engine(codes, cond, targets), cond, kept)

    def _objective(self, losses: tuple[Tensor | None, ...], cond: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """Scalars "loss", "image_loss" and, with captions, "caption_loss"."""
        image, caption = (*losses, None)[:2]
        assert image is not None
        pad = self._tokenizer.pad_id if self._tokenizer else None
        terms = objective(image, caption, cond, self._config.objective, pad, kept)
        named = {"loss": terms.total, "image_loss": terms.image}
        return named if terms.caption is None else {**named, "caption_loss": terms.caption}

    def _example(self, batch: CodeBatch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """What the model reads, (codes [b, H, W, D], cond [b, L]), and what it is compared with.

        The latter are targets (codes, or this rank's slice of soft ones [b, H, W, D, K/P]), cond, and the samples that
        count, bool [b].
        """
        codes, cond, kept = batch.codes, batch.cond, batch.weights.bool()
        if batch.latents is None:
            return (codes, cond), (codes, cond, kept)
        seed, places = self._config.train.seed, zip(batch.sample_ids.tolist(), batch.epochs.tolist(), strict=True)
        generators = [named_generator(seed, "draw", sample, epoch) for sample, epoch in places]
        drawing = batch.latents, self._config.objective.temperature, generators, self._groups.tensor
        if self._groups.topology.pp > 1 and self._groups.topology.pipeline_rank == 0:
            codes = self._rqvae.draw_hard_codes(*drawing)  # the targets are the last stage's
            return (codes, cond), (codes, cond, kept)
        codes, soft = self._rqvae.draw_codes(*drawing)
        return (codes, cond), (soft, cond, kept)

    def _shown_conditions(self) -> tuple[Tensor, str]:
        """[n, L] conditions, the same on all ranks, and what they say."""
        model, count = self._config.model, self._config.log.sample_count
        if model.condition == "none":
            return torch.zeros(count, 1, dtype=torch.int64, device=self._device), "unconditional"
        if model.condition == "class":
            classes = torch.arange(count, device=self._device) % model.cond_vocab_size
            return classes.unsqueeze(1), ", ".join(map(str, classes.tolist()))
        prompts = self._config.log.sample_prompts or self._sample_prompts or [""]
        prompts = [prompts[index % len(prompts)] for index in range(count)]
        assert self._tokenizer is not None
        tokens = [self._tokenizer.encode(prompt, model.cond_length) for prompt in prompts]
        return torch.tensor(tokens, device=self._device), "\n\n".join(prompts)
