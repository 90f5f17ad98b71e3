"""Tiny random models: an RQ-Transformer with the RQ-VAE it fits, in memory and as an exported folder.

models = build_models(cond_length=1, cond_vocab_size=5)     a model of five classes; by default, of captions
export_models(models, folder)                               what tools/export.py writes
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megarq.config.models import RQTransformerConfig, RQVAEConfig, StackConfig
from megarq.config.run import SamplingConfig
from megarq.inference.model_folder import ModelInfo, new_folder, write_info
from megarq.inference.pretrained import write_rqvae, write_transformer
from megarq.rqvae.model import RQVAE, fingerprint
from megarq.text.tokenizer import TextTokenizer
from megarq.transformer.rq_transformer import RQTransformer

WORDS = ["[PAD]", "[UNK]", "a", "seven", "two", "red", "blue", "small"]
STACK = {"layers": 2, "heads": 2}


class Models(NamedTuple):
    transformer: RQTransformer
    rqvae: RQVAE


def build_models(**changes: Any) -> Models:
    """Tiny random models of any configuration."""
    torch.manual_seed(0)
    config = transformer_config(**changes)
    rqvae = fitting_rqvae(config)
    return Models(random_transformer(config, rqvae), rqvae)


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


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer.json of WORDS, one token a word."""
    vocab = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]"])
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def export_models(
    models: Models,
    output: Path,
    dtype: torch.dtype = torch.float32,
    part_bytes: int = 10**9,
    tokenizer_file: Path | None = None,
) -> Path:
    """Write models as an exported folder; those of captions need a tokenizer."""
    config = models.transformer.config
    info = ModelInfo(models.rqvae.config, fingerprint(models.rqvae), config, SamplingConfig(), step=3)
    parameters = dict(models.transformer.named_parameters())
    with new_folder(output) as folder:
        if config.condition == "text":
            assert tokenizer_file is not None
            info.tokenizer = TextTokenizer.load(tokenizer_file).save(folder).name
        write_rqvae(models.rqvae, folder)
        write_transformer(folder, config, parameters.__getitem__, dtype, part_bytes)
        write_info(folder, info)
    return output
