from dataclasses import replace

import pytest
import torch

from megarq.config.models import RQTransformerConfig, RQVAEConfig, StackConfig
from megarq.planning.counts import rqvae_parameters, transformer_parameters
from megarq.rqvae.model import RQVAE
from megarq.transformer.rq_transformer import RQTransformer

SMALL = RQTransformerConfig(
    code_shape=[3, 2, 4],
    codebook_size=17,
    codebook_dim=8,
    embed_dim=24,
    body=StackConfig(layers=3, heads=2),
    head=StackConfig(layers=2, heads=3),
    cond_length=5,
    cond_vocab_size=11,
)
BARE = StackConfig(layers=2, heads=2, attention_bias=False, mlp_bias=False)
RAGGED = {"codebook_sizes": [17, 9, 9, 5], "shared_embedding": False, "shared_classifier": False}
VARIANTS = {
    "text": SMALL,
    "class": replace(SMALL, cond_length=1),
    "unconditional": replace(SMALL, cond_length=1, cond_vocab_size=1),
    "learned body": replace(SMALL, body_input="learned"),
    "learned head": replace(SMALL, head_input="learned"),
    "learned both": replace(SMALL, body_input="learned", head_input="learned"),
    "table per depth": replace(SMALL, body_input="learned", head_input="learned", shared_embedding=False),
    "classifier per depth": replace(SMALL, shared_classifier=False),
    "codebooks of several sizes": replace(SMALL, head_input="learned", **RAGGED),
    "depth one": replace(SMALL, code_shape=[3, 2, 1], head=StackConfig(layers=0, heads=3)),
    "no biases": replace(SMALL, body=BARE, head=BARE),
}
VAE = RQVAEConfig(
    resolution=16, channels=32, channel_multipliers=[1, 2], res_blocks=1, latent_channels=8, codebook_dim=8,
    codebook_size=20, depth=3,
)  # fmt: skip
VAE_VARIANTS = {
    "shared codebook": VAE,
    "codebook per depth": replace(VAE, codebook_sizes=[20, 10, 5], shared_codebook=False),
    "attention at two resolutions": replace(VAE, attention_resolutions=[8, 16]),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_transformer_parameters_are_those_of_the_built_model(name: str) -> None:
    with torch.device("meta"):
        model = RQTransformer(VARIANTS[name])
    assert transformer_parameters(VARIANTS[name]).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", VAE_VARIANTS)
def test_rqvae_parameters_are_those_of_the_built_model(name: str) -> None:
    with torch.device("meta"):
        model = RQVAE(VAE_VARIANTS[name])
    assert rqvae_parameters(VAE_VARIANTS[name]).trainable_total == sum(p.numel() for p in model.parameters())


def test_encoder_and_decoder_are_counted_apart() -> None:
    with torch.device("meta"):
        model = RQVAE(VAE)
    encoder = sum(p.numel() for part in (model.encoder, model.quant_conv) for p in part.parameters())
    assert rqvae_parameters(VAE).trainable["encoder"] == encoder


def test_every_codebook_counts_with_its_padding_row() -> None:
    counts = rqvae_parameters(VAE_VARIANTS["codebook per depth"])
    assert counts.frozen["codebook"] == (21 + 11 + 6) * 8


def test_parts_that_a_model_lacks_are_left_out() -> None:
    assert "caption classifier" not in transformer_parameters(VARIANTS["class"]).trainable
