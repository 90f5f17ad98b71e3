from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import build_models
from torch.utils.flop_counter import FlopCounterMode

from megarq.config.models import RQTransformerConfig, StackConfig
from megarq.inference.sampling import Guidance, sample_codes
from megarq.planning.counts import transformer_parameters
from megarq.planning.sampling import Work, codes_work, decoding_work

TINY = RQTransformerConfig(
    code_shape=[1, 2, 2],
    codebook_size=8,
    codebook_dim=2,
    embed_dim=4,
    body=StackConfig(layers=1, heads=1),
    head=StackConfig(layers=1, heads=1),
    cond_length=1,
    cond_vocab_size=5,
)
"""A block has 12 * 16 + 13 * 4 = 244 parameters, a projection 2 * 4 + 4 = 12, the classifier 8 + 32 + 8 = 48."""
WEIGHTS = 2 * 244 + 1 * 12 + 4 * (244 + 48) + 2 * 12
"""Body: condition and one stack. Head: four codes, of which two follow another at their position."""
KEYS = 2 + 2 * (1 + 2)
"""Tokens seen by the stack in the body, and at each of two positions in the head."""
MATRICES, PAIR, PROJECTION, CLASSIFIER = 24 * 16, 4 * 4, 2 * 2 * 4, 2 * 4 * 8
CONDITION = MATRICES + PAIR
FLOPS = 5 * MATRICES + KEYS * PAIR + (2 + 2) * PROJECTION + 4 * CLASSIFIER
"""Five tokens; the body reads two codes, the head two."""


def test_work_on_codes_is_that_counted_by_hand() -> None:
    work = codes_work(TINY, batch=3, conditions=2, bytes_each=2)
    assert work == Work(2 * WEIGHTS, 3 * 2 * KEYS * 2 * 4, 2 * CONDITION + 3 * FLOPS)


def test_guidance_doubles_the_pictures_and_adds_a_condition() -> None:
    work = codes_work(TINY, 3, 2, bytes_each=2, guided=True)
    assert work == Work(2 * WEIGHTS, 6 * 2 * KEYS * 2 * 4, 3 * CONDITION + 6 * FLOPS)


def test_a_picture_of_one_code_reads_every_parameter_once_but_embeddings_and_projections() -> None:
    config = replace(TINY, code_shape=[1, 1, 1])
    parts = transformer_parameters(config).trainable
    read = parts["body"] + parts["head"] + parts["code classifier"]
    assert codes_work(config, 1, 1, 4).weights == 4 * read


def test_learned_embeddings_are_not_projected() -> None:
    learned = codes_work(replace(TINY, body_input="learned", head_input="learned"), 1, 1, 1)
    assert learned.weights == WEIGHTS - 3 * 12 and learned.flops == CONDITION + FLOPS - 4 * PROJECTION


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cond_length": 1, "cond_vocab_size": 5},
        {"body_input": "learned"},
        {"shared_classifier": False},
        {"code_shape": [2, 2, 1], "head": StackConfig(layers=0, heads=2)},
    ],
    ids=["text", "class", "learned body", "classifier per depth", "depth one"],
)
def test_flops_of_codes_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    model = build_models(**changes).transformer
    cond = torch.tensor([1, 2, 1]).unsqueeze(1).expand(-1, model.config.cond_length)
    with FlopCounterMode(display=False) as counter:
        sample_codes(model, cond)
    assert codes_work(model.config, 3, 2, 4).flops == counter.get_total_flops()


def test_flops_of_guided_codes_are_those_that_torch_counts() -> None:
    model = build_models().transformer
    length = model.config.cond_length
    guidance = Guidance(3.0, torch.zeros(length, dtype=torch.int64))
    with FlopCounterMode(display=False) as counter:
        sample_codes(model, torch.tensor([[1], [2], [1]]).expand(-1, length), guidance=guidance)
    assert codes_work(model.config, 3, 2, 4, guided=True).flops == counter.get_total_flops()


def test_decoding_reads_the_decoder_once_and_computes_each_picture() -> None:
    rqvae = build_models().rqvae
    codes = torch.zeros(3, *rqvae.config.code_shape, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        rqvae.decode(codes)
    weights = sum(p.numel() for part in (rqvae.post_quant_conv, rqvae.decoder) for p in part.parameters())
    assert decoding_work(rqvae.config, 3, 4) == Work(4 * weights, 0, counter.get_total_flops())


def test_the_limit_adds_reading_and_computing() -> None:
    assert Work(weights=6, caches=4, flops=300).seconds(bandwidth=5.0, peak=100.0) == 5.0
