"""Training and sampling on a GPU; skipped where there is none."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_runs import ds_config, engine_run, largest_deviation, metrics_of, plain_run, tiny_config, tiny_rqvae

from megarq.inference.authors import import_pretrained
from megarq.inference.generator import ImageGenerator
from megarq.parallel.initialization import named_generator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.fixture(scope="module")
def nccl_group():
    """A group of this one process, as `python megarq/train.py` has."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 3e-2)])
def test_losses_and_gradient_norms_are_those_of_plain_torch_on_the_cpu(
    nccl_group, tmp_path, stage, precision, tolerance
):
    expected, _, _ = plain_run(tiny_config())
    engine_run(tmp_path, tiny_config(precision=precision), ds_config(stage), device=torch.device("cuda"))
    assert largest_deviation(metrics_of(tmp_path), expected) < tolerance


def test_a_resumed_run_goes_on_exactly(nccl_group, tmp_path):
    device, config = torch.device("cuda"), tiny_config(precision="bf16")
    config.checkpoint.every = 3
    whole = engine_run(tmp_path / "whole", config, ds_config(3), device=device)
    engine_run(tmp_path / "killed", config, ds_config(3), kill_at=4, device=device)
    resumed = engine_run(tmp_path / "killed", config, ds_config(3), device=device)
    assert largest_deviation(metrics_of(tmp_path / "killed"), metrics_of(tmp_path / "whole")) == 0
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("kind", ["text", "class"])
def test_greedy_codes_are_the_reference_outputs(tmp_path, kind):
    import numpy as np

    import_pretrained(REFERENCE / "rqvae", tmp_path / "model", REFERENCE / kind / "rqtransformer")
    generator = ImageGenerator.from_pretrained(tmp_path / "model", device="cuda")
    with np.load(REFERENCE / kind / "expected.npz") as arrays:
        cond, codes = (torch.from_numpy(arrays[name]) for name in ("cond", "greedy_codes"))
    assert torch.equal(generator.sample_codes(cond, top_k=1).cpu(), codes)


def test_codes_and_draws_of_latents_are_those_of_the_cpu():
    rqvae = tiny_rqvae()
    latents = torch.randn(8, 2, 2, 8, generator=named_generator(0, "latents"))
    generators = [[named_generator(0, "draw", index) for index in range(8)] for _ in range(2)]
    on_cpu = rqvae.quantize(latents), rqvae.draw_hard_codes(latents, 0.5, generators[0])
    rqvae.cuda()
    on_gpu = rqvae.quantize(latents.cuda()), rqvae.draw_hard_codes(latents.cuda(), 0.5, generators[1])
    assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, on_gpu, strict=True))
