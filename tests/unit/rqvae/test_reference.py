"""The reference outputs of the authors' implementation (fp32 on the CPU), from a checkpoint in their layout."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from megarq.rqvae.authors import config_from_authors, state_from_authors
from megarq.rqvae.model import RQVAE


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def model(reference_folder: Path) -> RQVAE:
    folder = reference_folder / "rqvae"
    config = config_from_authors(yaml.safe_load((folder / "config.yaml").read_text()))
    model = RQVAE(config).eval().requires_grad_(False)
    state = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict(state_from_authors(state, config))
    return model


@pytest.fixture(scope="module", params=["text", "class"])
def expected(request: pytest.FixtureRequest, reference_folder: Path) -> dict[str, Tensor]:
    with np.load(reference_folder / request.param / "expected.npz") as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}


def test_latents(model: RQVAE, expected: dict[str, Tensor]) -> None:
    close(model.encode(expected["images"]), expected["latents"])


def test_codes_are_exact(model: RQVAE, expected: dict[str, Tensor]) -> None:
    assert torch.equal(model.quantize(model.encode(expected["images"])), expected["codes"])


def test_soft_codes(model: RQVAE, expected: dict[str, Tensor]) -> None:
    soft = model.soft_codes(model.encode(expected["images"]), temperature=0.5)
    close(soft, expected["soft_codes"].float(), tolerance=1e-3)


def test_largest_soft_codes(model: RQVAE, expected: dict[str, Tensor]) -> None:
    soft = model.soft_codes(model.encode(expected["images"]), temperature=0.5)
    close(soft.topk(8, dim=-1).values, expected["soft_codes_sum_top"])


def test_forward(model: RQVAE, expected: dict[str, Tensor]) -> None:
    output = model(expected["images"])
    close(output.reconstruction, expected["reconstruction"])
    close(output.commitment_loss, expected["commitment_loss"])
    assert torch.equal(output.codes, expected["codes"])


def test_decoded(model: RQVAE, expected: dict[str, Tensor]) -> None:
    close(model.decode(expected["codes"]), expected["decoded"])


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_decoded_from_the_first_depths(model: RQVAE, expected: dict[str, Tensor], depth: int) -> None:
    close(model.decode(expected["codes"], depth=depth), expected[f"decoded_first_{depth}"])
