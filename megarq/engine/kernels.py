"""Which LayerNorm and AdamW run: those of NVIDIA's apex on CUDA where it is installed, torch's fused ones otherwise."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarq.config.deepspeed import offloads, zero_stage
from megarq.errors import ConfigError
from megarq.parallel.norms import LayerNorm

_BUILD = "Use train.kernels=torch, or build it from https://github.com/NVIDIA/apex with --cpp_ext and --cuda_ext."


@dataclass(frozen=True)
class Kernels:
    """What computes LayerNorm and AdamW's updates."""

    layer_norm: Callable[..., Tensor]
    """Called as F.layer_norm is."""
    adamw: Callable[..., torch.optim.Optimizer]
    """Called as torch.optim.AdamW is."""
    names: tuple[str, str]
    """Whose they are."""

    def describe(self) -> str:
        """For the log: which one runs."""
        return "LayerNorm by {}, AdamW by {}".format(*self.names)

    def apply(self, module: nn.Module) -> None:
        """Let all LayerNorms of a module be computed by these."""
        for layer in module.modules():
            if isinstance(layer, LayerNorm):
                layer.kernel = self.layer_norm


def choose_kernels(wanted: str, device: torch.device, ds: Mapping[str, Any]) -> Kernels:
    """Those of `train.kernels`: "auto", "torch" or "apex". Raises ConfigError where apex is asked for and cannot run.

    apex counts Adam's updates once for each parameter group, where ZeRO-3 steps a group in parts, and has no kernels
    for states in CPU memory: these two have torch's AdamW.
    """
    torchs = Kernels(F.layer_norm, partial(torch.optim.AdamW, fused=True), ("torch", "torch (fused)"))
    if wanted == "torch" or (wanted == "auto" and device.type != "cuda"):
        return torchs
    if device.type != "cuda":
        raise ConfigError(f"train.kernels=apex on a {device.type}: apex has kernels for CUDA alone. Use auto or torch.")
    try:
        layer_norm = import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
        adam = import_module("apex.optimizers").FusedAdam
        for extension in ("fused_layer_norm_cuda", "amp_C"):
            import_module(extension)
    except ImportError as error:
        if wanted == "auto":
            return torchs
        raise ConfigError(f"train.kernels=apex, but {_why_not()} ({error}). {_BUILD}") from error

    def fused_layer_norm(x: Tensor, shape: torch.Size, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        normed: Tensor = layer_norm(x, weight, bias, list(shape), eps)
        return normed

    if zero_stage(ds) == 3 or offloads(ds):
        return Kernels(fused_layer_norm, torchs.adamw, ("apex", torchs.names[1]))
    return Kernels(fused_layer_norm, partial(adam, adam_w_mode=True), ("apex", "apex"))


def _why_not() -> str:
    if find_spec("apex") is None:
        return "NVIDIA's apex is not installed"
    if find_spec("apex.normalization") is None:
        return "the apex installed is another project of that name, PyPI's"
    return "the apex installed has no CUDA extensions"
