"""Stage 1 on a GPU, discriminator included, against a process on the CPU; skipped where there is none.

Torch computes convolutions of fp32 in TF32, and adds with atomics in any order. What is compared in fp32 is therefore
trained in `exact_arithmetic`, and what is compared bit by bit with torch's deterministic algorithms.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_vgg import write_vgg
from tiny_runs import CPU, metrics_of
from tiny_stage1_runs import stage1_run, tiny_stage1

from megarq.checkpoint.run_folder import checkpoint_at
from megarq.config.run import CodebookConfig
from megarq.engine.adversary import Adversary
from megarq.rqvae.codebook import Codebook, Span, exact_arithmetic

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")
SAVED_AT, KILLED_AT, STEPS = 4, 5, 7
LOSSES = [term for term in Adversary.terms if term != "discriminator_grad_norm"]
TERMS = ("loss", "reconstruction_loss", "commitment_loss", *LOSSES)
SMALL = 4e-5
"""Learning rate: Adam turns a rounding error in a tiny gradient into a whole step."""
KMEANS = CodebookConfig(init="kmeans", init_batches=4, init_iterations=5)
"""Spread over the latents: of small random codes, two may be so near that rounding chooses between them."""
CASES = {
    "alone": tiny_stage1(STEPS, lr=SMALL),
    "with LPIPS": tiny_stage1(STEPS, lr=SMALL, loss={"perceptual_weight": 1.0}),
    "in micro-batches": tiny_stage1(STEPS, lr=SMALL, micro_batch_size=2),
}


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of VGG16."""
    pytest.importorskip("lpips")
    return write_vgg(tmp_path_factory.mktemp("vgg"))


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Torch's deterministic algorithms; of what has none, a warning."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.use_deterministic_algorithms(False)


def largest_difference(run: Path, expected: Path, terms: tuple[str, ...] = TERMS, steps: int = STEPS) -> float:
    """Of any loss of the first steps, in units of 1, or of the expected loss where that is larger."""
    ours, theirs = (metrics_of(folder)[:steps] for folder in (run, expected))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    pairs = [(mine[name], line[name]) for mine, line in zip(ours, theirs, strict=True) for name in terms]
    assert all((a is None) == (b is None) for a, b in pairs)
    return max(abs(a - b) / max(1, abs(b)) for a, b in pairs if b is not None)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_the_cpu(nccl_group, on_cpu, tmp_path, vgg, case, stage):
    config = replace(CASES[case], codebook=KMEANS)
    perceptual = config.loss.perceptual_weight > 0
    weights = vgg if perceptual else None
    on_cpu(stage1_run, tmp_path / "cpu", config, stage, None, CPU, weights)
    with exact_arithmetic("cuda"):
        stage1_run(tmp_path / "gpu", config, stage, None, CUDA, weights)
    terms = (*TERMS, "perceptual_loss") if perceptual else TERMS
    assert largest_difference(tmp_path / "gpu", tmp_path / "cpu", terms, steps=3) < 1e-4
    assert largest_difference(tmp_path / "gpu", tmp_path / "cpu", terms) < 0.05  # a near code may be chosen for another


def test_restarted_codes_are_those_of_the_cpu():
    on_cpu, on_gpu = (updated_codebook(device) for device in (CPU, CUDA))
    assert (on_cpu.cluster_size_ema == 1).any() and (on_cpu.cluster_size_ema > 1).any(), "some codes restart, some not"
    for name, expected in on_cpu.state_dict().items():
        torch.testing.assert_close(on_gpu.state_dict()[name].cpu(), expected, rtol=1e-5, atol=1e-6)


def updated_codebook(device: torch.device) -> Codebook:
    """Of 32 codes, after 3 updates by 64 vectors, of which the first 8 codes are chosen."""
    generator = torch.Generator().manual_seed(0)
    book = Codebook(32, 8, generator=generator).to(device)
    for _ in range(3):
        vectors = torch.randn(64, 8, generator=generator)
        chosen = torch.randint(8, (64,), generator=generator)
        book.update(vectors.to(device), chosen.to(device), Span(0, 64), generator)
    return book


def test_bf16_has_about_the_losses_of_fp32(nccl_group, on_cpu, tmp_path):
    on_cpu(stage1_run, tmp_path / "cpu", tiny_stage1(STEPS, lr=SMALL))
    stage1_run(tmp_path / "gpu", tiny_stage1(STEPS, lr=SMALL, precision="bf16"), device=CUDA)
    assert largest_difference(tmp_path / "gpu", tmp_path / "cpu", TERMS[:3]) < 0.05
    assert largest_difference(tmp_path / "gpu", tmp_path / "cpu") < 0.2  # the discriminator's, too


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_goes_on_exactly(nccl_group, deterministic, tmp_path, vgg, precision):
    config = tiny_stage1(STEPS, SAVED_AT, {"perceptual_weight": 1.0}, precision=precision, ema_decay=0.8)
    config.codebook = KMEANS
    whole = stage1_run(tmp_path / "whole", config, device=CUDA, vgg=vgg)
    stage1_run(tmp_path / "killed", config, kill_at=KILLED_AT, device=CUDA, vgg=vgg)
    assert checkpoint_at(tmp_path / "killed").metadata["step"] == SAVED_AT
    resumed = stage1_run(tmp_path / "killed", config, device=CUDA, vgg=vgg)
    assert largest_difference(tmp_path / "killed", tmp_path / "whole", (*TERMS, "perceptual_loss", "grad_norm")) == 0
    assert [name for name in whole if not torch.equal(resumed[name], whole[name])] == []
