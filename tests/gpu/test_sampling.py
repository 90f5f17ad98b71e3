"""Sampling on a GPU: captured steps, the kernel that draws, waiting for the device, and memory."""

from collections import Counter

import pytest
import torch
from tiny_models import build_models
from torch.profiler import ProfilerActivity, profile

from megarq.config.load import load_config
from megarq.config.models import StackConfig
from megarq.inference.frozen import Int8Weight, freezable
from megarq.inference.sampling import CodeSampler, Draws, Guidance, Sampler, sample_codes
from megarq.inference.settings import DepthSettings, depth_settings
from megarq.transformer.rq_transformer import RQTransformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda"
STACKS = {"body": StackConfig(layers=3, heads=4), "head": StackConfig(layers=2, heads=4)}
WIDE = {"embed_dim": 64, "code_shape": [6, 6, 3], "codebook_size": 1000, **STACKS}
"""Two windows: 4 tokens of captions and 36 positions."""


@pytest.fixture(scope="module")
def model():
    return build_models(**WIDE).transformer.eval()


def conditions(model, batch, seed=0):
    shape = (batch, model.config.cond_length)
    return torch.randint(model.config.cond_vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_captured_steps_draw_the_codes_of_a_cpu(model, scale):
    cond = conditions(model, 7)
    null = torch.zeros(model.config.cond_length, dtype=torch.int64)
    asked = {"top_k": 1, "guidance": Guidance(scale, null)}
    expected = sample_codes(model, cond, **asked)
    drawn = sample_codes(model.to(DEVICE), cond.to(DEVICE), **asked)
    model.cpu()
    assert torch.equal(drawn.cpu(), expected)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (50, 0.9)])
def test_captured_steps_draw_what_steps_one_by_one_draw(model, top_k, top_p):
    model.to(DEVICE)
    draws = Draws(model, 5, depth_settings(model.config.sizes, top_k, top_p))
    captured, plain = Sampler(model, 5, draws), Sampler(model, 5, draws, placed=False)
    for seed in range(3):  # the same graphs, batch after batch
        cond = conditions(model, 5, seed).to(DEVICE)
        draws.seed(seed, range(5))
        ours, theirs = captured.draw(cond), plain.draw(cond)
        assert (ours == theirs).double().mean() > 0.999
        assert not torch.equal(ours[:, 0, 0], ours[:, 0, 1])
    model.cpu()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one_draws_the_same(model):
    cond = conditions(model, 5)
    drawn = []
    for device in ("cuda:0", "cuda:1"):
        drawn.append(sample_codes(model.to(device), cond.to(device), top_k=50, top_p=0.9, progress=lambda count: None))
        assert torch.cuda.current_device() == 0
    model.cpu()
    assert torch.equal(drawn[0].cpu(), drawn[1].cpu())


@pytest.mark.parametrize("top_k", [16384, 1024, 7])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_the_kernel_draws_what_pytorch_draws(top_k, top_p, temperature):
    generator = torch.Generator().manual_seed(0)
    logits = torch.stack([torch.randperm(16384, generator=generator) for _ in range(300)]) / 16384 * 12
    uniform = torch.rand(300, generator=generator, dtype=torch.float64)
    settings = DepthSettings(top_k, top_p, temperature)
    drawn = settings.draw(logits.to(DEVICE), uniform.to(DEVICE)).cpu()
    assert (drawn == settings.draw(logits, uniform)).double().mean() >= 0.99  # rounding of exp at a boundary


def calls_of_a_batch(model, batch=4):
    """How often what was called on the host while one batch was drawn, the graphs captured before."""
    sampler = CodeSampler(model)
    settings = depth_settings(model.config.sizes, 20, 0.9)
    cond = conditions(model, batch).to(DEVICE)
    sampler.draw(cond, settings, 0, range(batch))
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        sampler.draw(cond, settings, 1, range(batch))
    return Counter(event.name for event in profiled.events())


def test_a_batch_is_a_launch_for_each_step_and_waits_only_before_and_after():
    calls = {}
    for side in (3, 6):
        model = build_models(**WIDE | {"code_shape": [side, side, 3]}).transformer.to(DEVICE).eval()
        calls[side] = calls_of_a_batch(model)
        assert calls[side]["cudaGraphLaunch"] == 2 * side**2 - 1
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpyAsync")
    for wait in waits:
        assert calls[3][wait] == calls[6][wait], wait


@pytest.mark.parametrize("int8", [False, True])
def test_the_largest_model_draws_within_its_memory(int8):
    config = load_config("t2i-3.9b", []).model
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = RQTransformer(config).eval()
    finally:
        torch.set_default_dtype(before)
    layers = freezable(model)
    for name, parameter in list(model.named_parameters()):
        values = torch.randn(parameter.shape, device=DEVICE, dtype=torch.bfloat16) * 0.02
        if int8 and name in layers:
            layers[name].freeze(Int8Weight, values)
        else:
            parameter.data = values
    model.to(DEVICE).load_codebook(torch.randn(config.codebook_size, config.codebook_dim))
    codes = sample_codes(model, conditions(model, 8), top_k=1024, top_p=0.95)
    assert codes.unique().numel() > 100
    peak = torch.cuda.max_memory_allocated() / 2**30
    assert peak < (7 if int8 else 12), peak
