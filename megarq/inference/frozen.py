"""Weights in the form that suits sampling, in place of the linear layers' parameters.

packed      the blocked layout of oneDNN, on a CPU: products of few rows then run at the memory's speed
int8        rows of 8 bits, each with its scale: half the memory of bf16, on any device
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megarq.parallel.layers import DepthParallelLinear, FreezableLinear, Product
from megarq.transformer.rq_transformer import RQTransformer

Form = Callable[[Tensor], Product]
"""From a weight [out, in] to what multiplies by it."""


class PackedWeight:
    """A weight in the layout that oneDNN's kernels read in order; nothing is rounded."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, "none", [], "")


class Int8Weight:
    """Each row of the weight as whole numbers from -127 to 127 times a scale, off by half the scale at most."""

    def __init__(self, weight: Tensor) -> None:
        scale = weight.float().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127  # [out, 1]
        self._quantized = (weight.float() / scale).round().to(torch.int8)
        self._scale = scale.squeeze(-1).to(weight.dtype)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x, self._quantized.to(x.dtype)) * self._scale
        return y if bias is None else y + bias


def fastest_form(device: torch.device, dtype: torch.dtype) -> Form | None:
    """The form that draws fastest without rounding; None for the parameters as they are."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    bf16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return PackedWeight if bf16 or dtype == torch.float32 else None


def freezable(transformer: RQTransformer) -> dict[str, FreezableLinear | DepthParallelLinear]:
    """The layers whose weights can be frozen, by the weights' names."""
    return {
        f"{name}.weight": layer
        for name, layer in transformer.named_modules()
        if isinstance(layer, FreezableLinear | DepthParallelLinear)
    }
