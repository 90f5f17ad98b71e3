"""What stage 2 does with a batch: losses, validation, and grids of sampled pictures.

Shapes: b samples, L condition length, H x W positions, D depth, K codebook size, P tensor-parallel size.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.utils import make_grid

from megarq.config.run import RQTransformerRunConfig
from megarq.data.loader import CodeBatch
from megarq.engine.snapshot import whole_transformer
from megarq.inference.sampling import sample_codes
from megarq.parallel.collectives import split_to
from megarq.parallel.initialization import named_generator
from megarq.parallel.topology import ProcessGroups
from megarq.rqvae.model import RQVAE
from megarq.text.tokenizer import TextTokenizer
from megarq.transformer.loss import LossTerms, objective


class TransformerTask:
    """Image and caption loss of code stacks under a DeepSpeed engine around an RQTransformer."""

    terms = ("loss", "image_loss", "caption_loss")

    def __init__(
        self,
        engine: Any,
        *,
        config: RQTransformerRunConfig,
        rqvae: RQVAE,
        tokenizer: TextTokenizer | None,
        validation: Callable[[], Iterable[CodeBatch]] | None,
        groups: ProcessGroups,
        device: torch.device,
        sample_prompts: Sequence[str] = (),
    ) -> None:
        """`rqvae` is frozen, on `device`; `validation` starts a pass over this rank's share of the held-out samples.

        `sample_prompts` are drawn where the configuration names none.
        """
        self._engine, self._config, self._rqvae = engine, config, rqvae
        self._tokenizer, self._validation = tokenizer, validation
        self._groups, self._device = groups, device
        self._sample_prompts = list(sample_prompts)

    def micro_batches(self, batch: CodeBatch, count: int) -> list[CodeBatch]:
        """Equal parts of a rank's share, in order."""
        names = [field.name for field in fields(batch) if isinstance(getattr(batch, field.name), Tensor)]
        parts = [getattr(batch, name).chunk(count) for name in names]
        return [replace(batch, **dict(zip(names, part, strict=True))) for part in zip(*parts, strict=True)]

    def losses(self, micro_batch: CodeBatch) -> dict[str, Tensor]:
        """Scalars "loss", "image_loss" and, with captions, "caption_loss"."""
        terms = self._terms(micro_batch)
        named = {"loss": terms.total, "image_loss": terms.image}
        return named if terms.caption is None else {**named, "caption_loss": terms.caption}

    def validate(self) -> dict[str, float] | None:
        """Mean losses over the held-out samples, each counted once."""
        if self._validation is None:
            return None
        sums: dict[str, Tensor] = {}
        count = torch.zeros((), device=self._device)
        for batch in self._validation():
            kept = batch.weights.bool()
            terms = self._terms(batch, kept)
            count += kept.sum()
            for name, value in zip(self.terms, terms, strict=True):
                if value is not None:
                    weighted = value.float() * kept.sum() if kept.any() else value.new_zeros(())
                    sums[name] = sums.get(name, torch.zeros_like(weighted)) + weighted
        values = torch.stack([*sums.values(), count])
        dist.all_reduce(values, group=self._groups.data)
        return {
            f"validation_{name}": value for name, value in zip(sums, (values[:-1] / values[-1]).tolist(), strict=True)
        }

    def pictures(self) -> tuple[Tensor, str] | None:
        """Pictures of a few prompts or classes, sampled with the configuration's settings."""
        model = whole_transformer(self._engine, self._config.model, self._groups.tensor)
        cond, text = self._shown_conditions()
        sampling = self._config.sampling
        codes = sample_codes(
            model, cond, sampling.top_k, sampling.top_p, sampling.temperature, seed=self._config.train.seed
        )
        images = self._rqvae.decode(codes).clamp(-1, 1).add(1).div(2)
        return make_grid(images.cpu(), nrow=max(1, round(len(images) ** 0.5))), text

    def _terms(self, batch: CodeBatch, kept: Tensor | None = None) -> LossTerms:
        """The objective of a batch, or of its `kept` samples alone (the forward pass runs on all)."""
        codes, cond, targets = self._inputs(batch)
        logits, caption_logits = self._engine(codes, cond)
        if kept is not None:
            kept = kept.to(self._device)
            logits, targets, cond = logits[kept], targets[kept], cond[kept]
            caption_logits = None if caption_logits is None else caption_logits[kept]
        pad = self._tokenizer.pad_id if self._tokenizer else None
        return objective(logits, caption_logits, targets, cond, self._config.objective, pad, self._groups.tensor)

    def _inputs(self, batch: CodeBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [b, H, W, D], condition [b, L], and targets: the codes, or soft ones [b, H, W, D, K/P]."""
        codes, cond = batch.codes.to(self._device), batch.cond.to(self._device)
        if batch.latents is None:
            return codes, cond, codes
        seed, places = self._config.train.seed, zip(batch.sample_ids.tolist(), batch.epochs.tolist(), strict=True)
        generators = [named_generator(seed, "draw", sample, epoch) for sample, epoch in places]
        latents = batch.latents.to(self._device).float()
        codes, soft = self._rqvae.draw_codes(latents, self._config.objective.temperature, generators)
        return codes, cond, split_to(soft, self._groups.tensor)

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
