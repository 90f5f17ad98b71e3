"""Picture sets drawn on a GPU; skipped where there is none.

The commands draw as they are used: matrices in fp32, the RQ-VAE's convolutions in TF32, by cuDNN's deterministic
algorithms. Bits are promised for batches of the same pictures; other batches, and the CPU, have the same codes.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from captioned_tars import contents
from scripts import ROOT, load_script
from tiny_models import build_models, export_models, write_tokenizer

from megarq.inference.generator import ImageGenerator
from megarq.rqvae.codebook import exact_arithmetic

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda"
COUNT, TARS, CLASSES = 64, 16, 4
SIZE = ("--pictures-per-tar", COUNT // TARS, "--batch-size", 2, "--seed", 5, "--device", DEVICE)
PROMPTS = ["a seven", "two", "a small red two", "blue seven"]
SECONDS = 120


@pytest.fixture(scope="module", autouse=True)
def algorithms() -> Iterator[None]:
    """The commands choose cuDNN's for good."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "deterministic", False)
        yield


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """A tiny model of captions and what to draw with it, but for --output."""
    folder = tmp_path_factory.mktemp("captions")
    model = export_models(build_models(), folder / "model", tokenizer_file=write_tokenizer(folder))
    (folder / "items.json").write_text(json.dumps(PROMPTS * (COUNT // len(PROMPTS))))
    return ("--model", model, "--items", folder / "items.json", *SIZE)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of classes."""
    models = build_models(cond_length=1, cond_vocab_size=CLASSES)
    return export_models(models, tmp_path_factory.mktemp("classes") / "model")


def draw(script: str, output: Path, *options: object) -> dict[str, bytes]:
    """Draw or go on in this process; all bytes of the set."""
    load_script(script).main([*map(str, options), "--output", str(output)])
    return contents(output)


def test_a_killed_and_resumed_set_has_the_bits_of_an_undisturbed_one(captions, tmp_path):
    command = [sys.executable, "evaluation/coco.py", *map(str, captions), "--output", str(tmp_path / "killed")]
    drawing = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + SECONDS
    while len(list((tmp_path / "killed").glob("*.tar"))) < 2:
        assert time.monotonic() < deadline and drawing.poll() is None, "no moment to kill at"
        time.sleep(0.001)
    drawing.kill()
    drawing.wait(SECONDS)
    assert len(list((tmp_path / "killed").glob("*.tar"))) < TARS, "killed too late"
    resumed = draw("evaluation/coco.py", tmp_path / "killed", *captions)
    assert resumed == draw("evaluation/coco.py", tmp_path / "whole", *captions)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_rank_draws_the_bits_of_one_alone(classes, tmp_path, monkeypatch, dtype):
    command = ("evaluation/class_conditional.py", "--model", classes, "--count", COUNT, *SIZE, "--dtype", dtype)
    script, *options = command
    alone = draw(script, tmp_path / "alone", *options)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)  # which begins with the other half, and finds nobody at the first
    assert draw(script, tmp_path / "shared", *options) == alone


@pytest.fixture(scope="module")
def codes_of_the_cpu(classes) -> torch.Tensor:
    """Of pictures 0, 1, .., drawn together."""
    return codes(classes, "cpu", COUNT, range(COUNT))


def codes(model: Path, device: str, batch_size: int, indices: Sequence[int], seed: int = 5) -> torch.Tensor:
    """Drawn in this order, on the CPU; each index has one class."""
    generator = ImageGenerator.from_pretrained(model, device, batch_size=batch_size)
    cond = generator.conditions(classes=[index % CLASSES for index in indices])
    return generator.sample_codes(cond, seed=seed, indices=indices).cpu()


@pytest.mark.parametrize("batch_size", [1, 7, COUNT])
def test_codes_follow_from_seed_and_index_alone(classes, codes_of_the_cpu, batch_size):
    backwards = range(COUNT)[::-1]
    assert torch.equal(codes(classes, DEVICE, batch_size, backwards).flip(0), codes_of_the_cpu)
    assert not torch.equal(codes(classes, DEVICE, batch_size, backwards, seed=6).flip(0), codes_of_the_cpu)


def test_pictures_of_codes_are_those_of_the_cpu_to_a_level(classes, codes_of_the_cpu):
    """In exact arithmetic; the commands decode in TF32."""
    with exact_arithmetic(DEVICE):
        ours, expected = (levels(classes, device, codes_of_the_cpu) for device in (DEVICE, "cpu"))
    assert expected.std() > 1 and np.abs(ours - expected).max() <= 1


def levels(model: Path, device: str, codes: torch.Tensor) -> np.ndarray:
    """The pictures of codes, [N, R, R, 3]."""
    pictures = ImageGenerator.from_pretrained(model, device).decode(codes.to(device))
    return np.stack([np.asarray(picture, dtype=int) for picture in pictures])
