from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml

from megarq.transformer.authors import config_from_authors, state_from_authors
from megarq.transformer.rq_transformer import RQTransformer

REFERENCE = Path(__file__).parents[2] / "reference"


class Reference(NamedTuple):
    model: RQTransformer
    expected: dict[str, torch.Tensor]


@pytest.fixture(scope="session", params=["text", "class"])
def reference(request: pytest.FixtureRequest) -> Reference:
    """One of the reference models with what the authors' implementation answers."""
    folder = REFERENCE / request.param / "rqtransformer"
    config = config_from_authors(yaml.safe_load((folder / "config.yaml").read_text()))
    state = torch.load(folder / "model.pt", weights_only=True)["state_dict"]
    model = RQTransformer(config).eval()
    model.load_state_dict(state_from_authors(state, config))
    codebook = torch.load(REFERENCE / "rqvae" / "model.pt", weights_only=True)["state_dict"]
    model.load_codebook(codebook["quantizer.codebooks.0.weight"][:-1])
    with np.load(REFERENCE / request.param / "expected.npz") as arrays:
        return Reference(model, {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays})
