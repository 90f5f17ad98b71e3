"""The RQ-Transformer (Lee et al. 2022, section 3.2): a body over positions, a head over the depths of each.

Shapes: B batch, L condition length, H x W = T positions, D depth, E width, K codebook size, C codebook dim,
V condition vocabulary, P tensor-parallel size.
"""

import torch
from torch import Tensor

from megarq.config.models import RQTransformerConfig
from megarq.errors import ConfigError
from megarq.parallel.topology import ALONE, TensorGroup
from megarq.transformer.blocks import KeyValueCache
from megarq.transformer.inputs import BodyInput, HeadInput
from megarq.transformer.outputs import Outputs
from megarq.transformer.stages import Stage, layer_list

WINDOW_STEP = 16
"""Captured steps read the caches up to a multiple of so many tokens, which attention kernels like aligned."""


class RQTransformer(Stage):
    """All layers of the list in one process group's memory. Call `initialize` or load weights, then `load_codebook`."""

    body_input: BodyInput
    head_input: HeadInput
    outputs: Outputs

    def __init__(
        self,
        config: RQTransformerConfig,
        tp: TensorGroup = ALONE,
        *,
        shared_codebook: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        """`shared_codebook` says whether the RQ-VAE has one codebook for all depths. Raises ConfigError."""
        config.validate()
        super().__init__(config, layer_list(config, tp, shared_codebook), tp, activation_checkpointing)

    def forward(
        self, codes: Tensor, cond: Tensor | None = None, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of every code and of every caption token after the first; with targets, the loss of each.

        Args:
            codes: int64 [B, H, W, D].
            cond: int64 [B, L] caption tokens or [B, 1] class; None where the model has no condition.
            targets: codes int64 [B, H, W, D], or this rank's slice of soft targets [B, H, W, D, K/P].

        Returns:
            Logits [B, H, W, D, K/P] and [B, L-1, V/P]; or cross-entropies [B, H, W, D] and [B, L-1] in fp32, for which
            no more than a part of the logits is ever held. None in place of the second where L is 1.
        """
        cond = self.fill_condition(cond, len(codes))
        image, caption = self.finish(self.run((codes, cond)), targets, cond)
        return image, caption

    def fill_condition(self, cond: Tensor | None, batch: int) -> Tensor:
        """The condition as int64 [B, L]; the one token of a model without condition. Raises ConfigError."""
        device = self.body_input.positions.device
        if cond is None:
            if self.config.condition != "none":
                raise ConfigError(f"the model is conditioned on {self.config.condition}, but cond is None: give cond.")
            return torch.zeros(batch, 1, dtype=torch.int64, device=device)
        if cond.numel() != batch * self.config.cond_length:
            raise ConfigError(
                f"cond has shape {list(cond.shape)}: give [{batch}, {self.config.cond_length}] "
                f"(batch, model.cond_length)."
            )
        return cond.view(batch, self.config.cond_length)

    def new_caches(self, batch: int) -> tuple[list[KeyValueCache], list[KeyValueCache]]:
        """Empty caches for the blocks of the body and of the head, for `batch` pictures.

        The body's have room for a multiple of WINDOW_STEP tokens.
        """
        weight = self.body_input.positions
        length = self.config.cond_length + self.config.positions - 1
        tokens = (-(-length // WINDOW_STEP) * WINDOW_STEP, self.config.depth)
        stacks = ((self.config.body, tokens[0]), (self.config.head, tokens[1]))
        body, head = (
            [
                KeyValueCache(
                    (batch, stack.heads // self.tp.size, length, self.config.embed_dim // stack.heads),
                    weight.device,
                    weight.dtype,
                )
                for _ in range(stack.layers)
            ]
            for stack, length in stacks
        )
        return body, head
