from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from tiny_models import STACK, Models, build_models, export_models, write_tokenizer

from megarq.config.models import RQTransformerConfig, StackConfig

REFERENCE = Path(__file__).parents[2] / "reference"
VARIANTS: dict[str, dict[str, Any]] = {
    "text": {},
    "class": {"cond_length": 1, "cond_vocab_size": 5},
    "unconditional": {"cond_length": 1, "cond_vocab_size": 1},
    "learned, one table": {"body_input": "learned", "head_input": "learned"},
    "learned, a table per depth": {"body_input": "learned", "head_input": "learned", "shared_embedding": False},
    "learned body": {"body_input": "learned", "shared_embedding": False},
    "learned head": {"head_input": "learned"},
    "no cumulative sum": {"cumulative_depth": False},
    "classifier per depth": {"shared_classifier": False},
    "sizes per depth": {
        "body_input": "learned",
        "head_input": "learned",
        "shared_embedding": False,
        "shared_classifier": False,
        "codebook_sizes": [12, 7, 9],
    },
    "sizes and codebooks per depth": {"shared_classifier": False, "codebook_sizes": [12, 7, 9]},
    "depth 1 without head": {"code_shape": [2, 2, 1], "head": StackConfig(layers=0, heads=2)},
    "no biases, sigmoid gelu": {
        name: StackConfig(**STACK, gelu="sigmoid", attention_bias=False, mlp_bias=False) for name in ("body", "head")
    },
}


@pytest.fixture(scope="session")
def build() -> Callable[..., Models]:
    """Tiny random models of any configuration: build(cond_length=1, ..)."""
    return build_models


@pytest.fixture(scope="session", params=VARIANTS)
def variant(request: pytest.FixtureRequest, build: Callable[..., Models]) -> Models:
    """Every variant that a released configuration may be of."""
    return build(**VARIANTS[request.param])


@pytest.fixture(scope="session")
def random_inputs() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Codes [B, H, W, D] and conditions [B, L] that a configuration allows."""

    def make(config: RQTransformerConfig, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        shape = (batch, *config.code_shape[:2])
        depths = [torch.randint(size, shape, generator=generator) for size in config.sizes]
        cond = torch.randint(config.cond_vocab_size, (batch, config.cond_length), generator=generator)
        return torch.stack(depths, dim=-1), cond

    return make


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json of `tiny_models.WORDS`, one token a word."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def export(tokenizer_file: Path) -> Callable[..., Path]:
    """Write models as an exported folder: export(models, folder, **write_transformer's options)."""
    return partial(export_models, tokenizer_file=tokenizer_file)


class ReferenceModel(NamedTuple):
    rqvae: Path
    rqtransformer: Path
    expected: dict[str, torch.Tensor]


@pytest.fixture(scope="session", params=["text", "class"])
def reference(request: pytest.FixtureRequest) -> ReferenceModel:
    """One of the reference checkpoints with what the authors' implementation answers."""
    with np.load(REFERENCE / request.param / "expected.npz") as arrays:
        expected = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}
    return ReferenceModel(REFERENCE / "rqvae", REFERENCE / request.param / "rqtransformer", expected)


@pytest.fixture(scope="session")
def write_authors() -> Callable[..., Path]:
    """Write a folder in the authors' layout: write_authors(folder, document, content, name)."""

    def write(folder: Path, document: Any, content: Any, name: str = "model.pt") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
        torch.save(content, folder / name)
        return folder

    return write
