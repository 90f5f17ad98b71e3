"""Which LayerNorm and AdamW run: what `train.kernels` chooses, what it says, and when it is refused."""

import sys

import made_up_apex
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megarq.config.run import TrainConfig
from megarq.engine.build import prepare
from megarq.engine.kernels import choose_kernels
from megarq.errors import ConfigError
from megarq.parallel.norms import LayerNorm

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ZERO1 = {"zero_optimization": {"stage": 1}}
ZERO3 = {"zero_optimization": {"stage": 3}}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.fixture
def apex(monkeypatch):
    """NVIDIA's apex is importable."""
    for name, module in made_up_apex.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def other_apex(monkeypatch, tmp_path):
    """PyPI's project of that name is importable."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(("wanted", "device"), [("torch", CPU), ("torch", CUDA), ("auto", CPU)])
def test_torch_runs_where_it_is_asked_for_and_on_cpus(apex, wanted, device):
    kernels = choose_kernels(wanted, device, ZERO1)
    assert kernels.layer_norm is F.layer_norm
    assert kernels.describe() == "LayerNorm by torch, AdamW by torch (fused)"


def test_torch_runs_where_there_is_no_apex():
    assert choose_kernels("auto", CUDA, ZERO1).layer_norm is F.layer_norm


@pytest.mark.parametrize("wanted", ["auto", "apex"])
def test_apex_runs_on_cuda(apex, wanted):
    assert choose_kernels(wanted, CUDA, ZERO1).describe() == "LayerNorm by apex, AdamW by apex"


@pytest.mark.parametrize("ds", [ZERO3, OFFLOAD])
def test_adamw_is_torchs_where_apex_counts_or_computes_wrongly(apex, ds):
    assert choose_kernels("apex", CUDA, ds).describe() == "LayerNorm by apex, AdamW by torch (fused)"


def test_apex_on_a_cpu_is_refused(apex):
    with pytest.raises(ConfigError, match="train.kernels=apex on a cpu.*Use auto or torch"):
        choose_kernels("apex", CPU, ZERO1)


def test_a_missing_apex_is_refused_with_how_to_build_it():
    with pytest.raises(
        ConfigError, match="NVIDIA's apex is not installed.*build it from https://github.com/NVIDIA/apex"
    ):
        choose_kernels("apex", CUDA, ZERO1)


def test_the_other_apex_is_told_apart(other_apex):
    with pytest.raises(ConfigError, match="another project of that name, PyPI's.*Use train.kernels=torch"):
        choose_kernels("apex", CUDA, ZERO1)


def test_an_apex_without_extensions_is_refused(apex, monkeypatch):
    monkeypatch.setitem(sys.modules, "amp_C", None)
    with pytest.raises(ConfigError, match="has no CUDA extensions"):
        choose_kernels("apex", CUDA, ZERO1)


def test_every_norm_of_a_module_has_the_kernel(apex, monkeypatch):
    monkeypatch.setattr(made_up_apex, "CALLS", {"layer_norm": 0, "adam": 0})
    module = nn.Sequential(LayerNorm(4), nn.Sequential(LayerNorm(4)))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = module(x)
    choose_kernels("apex", CUDA, ZERO1).apply(module)
    assert torch.equal(module(x), expected)
    assert made_up_apex.CALLS["layer_norm"] == 2


def test_apexs_adam_is_adamw_with_our_settings(apex):
    train = TrainConfig(steps=1, lr=0.25, betas=[0.5, 0.75], weight_decay=0.125)
    module = nn.Linear(2, 2)
    optimizer = prepare(module, train, lambda name: name == "weight", choose_kernels("apex", CUDA, ZERO1))
    assert isinstance(optimizer, made_up_apex.FusedAdam)
    settings = [(group["lr"], group["betas"], group["weight_decay"]) for group in optimizer.param_groups]
    assert settings == [(0.25, (0.5, 0.75), 0.125), (0.25, (0.5, 0.75), 0.0)]


def test_torchs_adamw_is_fused():
    optimizer = prepare(nn.Linear(2, 2), TrainConfig(steps=1), bool, choose_kernels("torch", CPU, ZERO1))
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
