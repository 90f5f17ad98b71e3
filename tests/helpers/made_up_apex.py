"""A stand-in for NVIDIA's apex: the same numbers as torch's on any device, apex's way of keeping state, and counters.

apex keeps Adam's `step` in the parameter group, as an int, and the moments in the state without one.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CALLS = {"layer_norm": 0, "adam": 0}


def fused_layer_norm_affine(x: Tensor, weight: Tensor, bias: Tensor, shape: list[int], eps: float = 1e-6) -> Tensor:
    """apex.normalization.fused_layer_norm.fused_layer_norm_affine."""
    CALLS["layer_norm"] += 1
    return F.layer_norm(x, shape, weight, bias, eps)


class FusedAdam(torch.optim.Optimizer):
    """apex.optimizers.FusedAdam."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        CALLS["adam"] += 1
        for group in self.param_groups:
            (beta1, beta2), rate = group["betas"], group["lr"]
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                scale = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
                p.mul_(1 - rate * group["weight_decay"])
                p.addcdiv_(state["exp_avg"], scale, value=-rate / (1 - beta1 ** group["step"]))


def modules() -> dict[str, ModuleType]:
    """Its modules by name, for sys.modules."""
    names = ("apex", "apex.normalization", "apex.normalization.fused_layer_norm", "apex.optimizers")
    all_names = (*names, "fused_layer_norm_cuda", "amp_C")
    found = {name: module_from_spec(ModuleSpec(name, None, is_package=True)) for name in all_names}
    found["apex.normalization.fused_layer_norm"].fused_layer_norm_affine = fused_layer_norm_affine
    found["apex.optimizers"].FusedAdam = FusedAdam
    return found


def install() -> None:
    """Let `import apex` find it, in this process."""
    sys.modules.update(modules())
