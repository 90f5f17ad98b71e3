from pathlib import Path

import pytest
import torch
import yaml

from megarq.config.models import RQVAEConfig
from megarq.rqvae.model import RQVAE

REFERENCE = Path(__file__).parents[2] / "reference"


@pytest.fixture(scope="session")
def reference_folder() -> Path:
    return REFERENCE


@pytest.fixture
def authors_config() -> dict:
    return yaml.safe_load((REFERENCE / "rqvae" / "config.yaml").read_text())


@pytest.fixture
def authors_state() -> dict:
    return torch.load(REFERENCE / "rqvae" / "model.pt", map_location="cpu", weights_only=True)["state_dict"]


@pytest.fixture
def tiny_config() -> RQVAEConfig:
    return RQVAEConfig(
        resolution=8,
        channels=32,
        channel_multipliers=[1, 1],
        res_blocks=1,
        attention_resolutions=[4],
        latent_channels=8,
        codebook_dim=6,
        codebook_size=16,
        depth=3,
    )


@pytest.fixture
def tiny(tiny_config: RQVAEConfig) -> RQVAE:
    torch.manual_seed(0)
    return RQVAE(tiny_config)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
