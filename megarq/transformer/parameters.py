"""What a parameter's name says of it, in every mode: its first value and its weight decay."""

from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from megarq.config.models import RQTransformerConfig
from megarq.errors import ConfigError
from megarq.parallel.initialization import normal_values
from megarq.parallel.topology import TensorGroup
from megarq.transformer.inputs import FrozenCodebook

Write = Callable[[nn.Parameter, Tensor], object]
"""Puts this tensor rank's values into a parameter."""


@torch.no_grad()
def copy_whole(parameter: nn.Parameter, value: Tensor) -> None:
    """Write to a parameter that is held whole."""
    parameter.copy_(value)


class NamedParameters(nn.Module):
    """A module that holds some or all layers of the list under their names."""

    def __init__(self, config: RQTransformerConfig, tp: TensorGroup) -> None:
        super().__init__()
        self.config, self.tp = config, tp

    def initialize(self, seed: int, write: Write = copy_whole) -> None:
        """N(0, 0.02) weights and embeddings, residual outputs over sqrt(2 layers), biases 0, norms 1 (as in GPT-2).

        A value depends on the seed and the parameter's name alone. `write` stores it where ZeRO-3 has cut the
        parameter already; values are made one parameter at a time.
        """
        for name, parameter in self.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if name.endswith("bias"):
                value = torch.zeros(shape)
            elif name.split(".")[-2] in ("ln1", "ln2", "norm"):
                value = torch.ones(shape)
            else:
                dim = getattr(parameter, "partition_dim", None)
                value = normal_values(shape, 0.02 / self._residual_scale(name), seed, name, self.tp, dim)
            write(parameter, value)

    def _residual_scale(self, name: str) -> float:
        if not name.endswith(("attention.output.weight", "mlp.down.weight")):
            return 1.0
        stack = self.config.body if name.startswith("body.") else self.config.head
        return sqrt(2 * stack.layers)

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


def decayed(name: str) -> bool:
    """Whether weight decay applies to a parameter: to matrices, not to biases, norms, embeddings and positions."""
    matrix = name.endswith(("qkv.weight", "output.weight", "up.weight", "down.weight", "linear.weight"))
    return matrix or name.endswith("projection.weight")
