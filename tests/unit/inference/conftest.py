from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megarq.config.models import RQTransformerConfig, RQVAEConfig, StackConfig
from megarq.config.run import SamplingConfig
from megarq.inference.model_folder import ModelInfo, new_folder, write_info
from megarq.inference.pretrained import write_rqvae, write_transformer
from megarq.rqvae.model import RQVAE, fingerprint
from megarq.text.tokenizer import TextTokenizer
from megarq.transformer.rq_transformer import RQTransformer

REFERENCE = Path(__file__).parents[2] / "reference"
WORDS = ["[PAD]", "[UNK]", "a", "seven", "two", "red", "blue", "small"]

STACK = {"layers": 2, "heads": 2}
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


def transformer_config(**changes: Any) -> RQTransformerConfig:
    fields = {
        "code_shape": [2, 2, 3],
        "codebook_size": 12,
        "codebook_dim": 8,
        "embed_dim": 16,
        "body": StackConfig(**STACK),
        "head": StackConfig(**STACK),
        "cond_length": 4,
        "cond_vocab_size": len(WORDS),
    }
    return RQTransformerConfig(**fields | changes)


def fitting_rqvae(config: RQTransformerConfig) -> RQVAE:
    """A tiny random RQ-VAE with the codes of a transformer."""
    rqvae = RQVAE(
        RQVAEConfig(
            resolution=2 * config.code_shape[0],
            channels=32,
            channel_multipliers=[1, 1],
            res_blocks=1,
            attention_resolutions=[],
            latent_channels=8,
            codebook_dim=config.codebook_dim,
            codebook_size=config.codebook_size,
            codebook_sizes=config.codebook_sizes,
            depth=config.depth,
            shared_codebook=config.codebook_sizes is None,
        )
    ).eval()
    return rqvae.requires_grad_(False)


def random_transformer(config: RQTransformerConfig, rqvae: RQVAE) -> RQTransformer:
    """A transformer whose weights are large enough for its probabilities to differ visibly."""
    model = RQTransformer(config, shared_codebook=rqvae.config.shared_codebook).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    model.load_codebook(rqvae.codebook_weights())
    return model.requires_grad_(False)


class Models(NamedTuple):
    transformer: RQTransformer
    rqvae: RQVAE


@pytest.fixture(scope="session")
def build() -> Callable[..., Models]:
    """Tiny random models of any configuration: build(cond_length=1, ..)."""

    def make(**changes: Any) -> Models:
        torch.manual_seed(0)
        config = transformer_config(**changes)
        rqvae = fitting_rqvae(config)
        return Models(random_transformer(config, rqvae), rqvae)

    return make


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
    """A tokenizer.json of WORDS, one token a word."""
    vocab = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def export(tokenizer_file: Path) -> Callable[..., Path]:
    """Write models as an exported folder: export(models, folder, **write_transformer's options)."""

    def write(models: Models, output: Path, dtype: torch.dtype = torch.float32, part_bytes: int = 10**9) -> Path:
        config = models.transformer.config
        info = ModelInfo(models.rqvae.config, fingerprint(models.rqvae), config, SamplingConfig(), step=3)
        parameters = dict(models.transformer.named_parameters())
        with new_folder(output) as folder:
            if config.condition == "text":
                info.tokenizer = TextTokenizer.load(tokenizer_file).save(folder).name
            write_rqvae(models.rqvae, folder)
            write_transformer(folder, config, parameters.__getitem__, dtype, part_bytes)
            write_info(folder, info)
        return output

    return write


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
