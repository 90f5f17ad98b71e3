"""The RQ-Transformer (Lee et al. 2022, section 3.2): a body over positions, a head over the depths of each.

Shapes: B batch, L condition length, H x W = T positions, D depth, E width, K codebook size, C codebook dim,
V condition vocabulary, P tensor-parallel size.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megarq.config.models import RQTransformerConfig
from megarq.errors import ConfigError
from megarq.parallel.initialization import fill_normal
from megarq.parallel.topology import ALONE, TensorGroup
from megarq.transformer.blocks import Block, KeyValueCache
from megarq.transformer.inputs import BodyInput, FrozenCodebook, HeadInput
from megarq.transformer.outputs import Outputs
from megarq.transformer.stages import State, layer_list


class RQTransformer(nn.Module):
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
        super().__init__()
        config.validate()
        self.config = config
        self.tp = tp
        self.activation_checkpointing = activation_checkpointing
        self.body = nn.ModuleList()
        self.head = nn.ModuleList()
        self._layers = layer_list(config, tp, shared_codebook)
        for layer in self._layers:
            stack, _, index = layer.name.partition(".")
            if index:
                self.get_submodule(stack).append(layer.build())  # type: ignore[operator]
            else:
                self.add_module(layer.name, layer.build())

    def forward(self, codes: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits of every code, and of every caption token after the first.

        Args:
            codes: int64 [B, H, W, D].
            cond: int64 [B, L] caption tokens or [B, 1] class; None where the model has no condition.

        Returns:
            [B, H, W, D, K/P] and [B, L-1, V/P], or None in place of the latter where L is 1.
        """
        state: State = (codes, self.fill_condition(cond, len(codes)))
        for layer in self._layers:
            module = self.get_submodule(layer.name)
            if self.activation_checkpointing and self.training and isinstance(module, Block):
                state = checkpoint(layer.apply, module, state, use_reentrant=False)
            else:
                state = layer.apply(module, state)
        return state[0], state[1]

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

    @torch.no_grad()
    def load_codebook(self, vectors: Tensor | Sequence[Tensor]) -> None:
        """Take the frozen RQ-VAE's codebook: [K, C], or one [K_d, C] per depth. Raises ConfigError where it differs."""
        table = vectors if isinstance(vectors, Tensor) else torch.cat(list(vectors))
        for module in self.modules():
            if isinstance(module, FrozenCodebook):
                if module.vectors.shape != table.shape:
                    raise ConfigError(
                        f"the RQ-VAE's codebook is {list(table.shape)}, the model's {list(module.vectors.shape)}: set "
                        "model.codebook_size and model.codebook_dim to the RQ-VAE's."
                    )
                module.vectors.copy_(table)

    def new_caches(self, batch: int) -> tuple[list[KeyValueCache], list[KeyValueCache]]:
        """Empty caches for the blocks of the body and of the head, for `batch` pictures."""
        weight = self.body_input.positions
        tokens = (self.config.cond_length + self.config.positions - 1, self.config.depth)
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

    def initialize(self, seed: int) -> None:
        """N(0, 0.02) weights and embeddings, residual outputs over sqrt(2 layers), biases 0, norms 1 (as in GPT-2)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif _is_norm(name):
                nn.init.ones_(parameter)
            else:
                fill_normal(parameter, 0.02 / self._residual_scale(name), seed, name, self.tp)

    def _residual_scale(self, name: str) -> float:
        if not name.endswith(("attention.output.weight", "mlp.down.weight")):
            return 1.0
        stack = self.config.body if name.startswith("body.") else self.config.head
        return sqrt(2 * stack.layers)

    def decayed(self, name: str) -> bool:
        """Whether weight decay applies to a parameter: to matrices, not to biases, norms, embeddings and positions."""
        matrix = name.endswith(("qkv.weight", "output.weight", "up.weight", "down.weight", "linear.weight"))
        return matrix or name.endswith("projection.weight")


def _is_norm(name: str) -> bool:
    return name.split(".")[-2] in ("ln1", "ln2", "norm")
