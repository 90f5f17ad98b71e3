"""Every rule on layouts: what is refused, with which words, before any process group exists."""

from dataclasses import replace
from typing import Any

import pytest

from megarq.config.layout import check_layout
from megarq.config.models import RQTransformerConfig, StackConfig
from megarq.config.run import ParallelConfig, TrainConfig
from megarq.errors import ConfigError

MODEL = RQTransformerConfig(
    code_shape=[4, 4, 2],
    codebook_size=64,
    embed_dim=48,
    body=StackConfig(layers=2, heads=12),
    head=StackConfig(layers=1, heads=12),
    cond_length=8,
    cond_vocab_size=96,
)
RANKS = 24


def check(
    parallel: dict[str, Any], model: dict[str, Any] | None = None, stage: int = 1, ranks: int = RANKS, **train: Any
) -> None:
    check_layout(
        replace(MODEL, **(model or {})),
        ParallelConfig(**parallel),
        TrainConfig(**({"steps": 1, "global_batch_size": 48} | train)),
        {"zero_optimization": {"stage": stage}},
        ranks,
    )


@pytest.mark.parametrize(
    ("parallel", "stage"),
    [
        ({}, 1),
        ({}, 3),
        ({"tp": 2}, 3),
        ({"tp": 4, "pp": 2}, 1),
        ({"tp": 4}, 2),
        ({"pp": 6}, 1),
        ({"tp": 2, "sequence": True}, 1),
    ],
)
def test_lawful_layouts_pass(parallel, stage):
    check(parallel, stage=stage)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"parallel": {"tp": 5}}, r"parallel.tp=5 x parallel.pp=1 = 5 does not divide the 24 ranks started. Start"),
        ({"parallel": {"tp": 4, "pp": 4}}, r"parallel.tp=4 x parallel.pp=4 = 16 does not divide the 24 ranks"),
        ({"parallel": {"tp": 0}}, "parallel.tp=0: use"),
        (
            {"parallel": {"tp": 4, "sequence": True}, "model": {"code_shape": [1, 1, 4], "cond_length": 2}},
            "parallel.sequence over parallel.tp=4: the body has 2 tokens, fewer than ranks. Set parallel.sequence",
        ),
        ({"parallel": {}, "global_batch_size": 25}, "train.global_batch_size=25 is not divisible by the 24"),
        ({"parallel": {"tp": 4}, "micro_batch_size": 3}, "train.micro_batch_size=3 does not divide a rank's share"),
        ({"parallel": {"pp": 2}, "stage": 2}, "parallel.pp=2 with ZeRO stage 2.*Use --ds_config zero1.json"),
        ({"parallel": {"tp": 2}, "stage": 0}, "parallel.tp=2, parallel.pp=1 with ZeRO stage 0"),
        ({"parallel": {"tp": 8}}, "model.body.heads=12 is not divisible by parallel.tp=8. Choose a tp"),
        (
            {"parallel": {"tp": 8}, "model": {"body": StackConfig(heads=16, layers=1)}},
            "model.head.heads=12 is not divisible by parallel.tp=8",
        ),
        ({"parallel": {"tp": 2}, "model": {"embed_dim": 45}}, "model.embed_dim=45 is not divisible by parallel.tp=2"),
        ({"parallel": {"tp": 2}, "model": {"codebook_size": 63}}, "model.codebook_size=63 is not divisible by"),
        ({"parallel": {"tp": 2}, "model": {"cond_vocab_size": 95}}, "model.cond_vocab_size=95 is not divisible by"),
        ({"parallel": {"sequence": True}}, "parallel.sequence=true with parallel.tp=1.*Set parallel.tp"),
        (
            {"parallel": {"tp": 2, "sequence": True}, "model": {"code_shape": [3, 3, 1]}},
            "code_shape's H x W x D=9 is not divisible by parallel.tp=2",
        ),
        ({"parallel": {"pp": 8}}, "parallel.pp=8, but the model has 6 layers.*Use parallel.pp=6 or less"),
        (
            {"parallel": {"pp": 2}, "model": {"body_input": "learned", "head_input": "learned"}},
            "parallel.pp=2 with learned embeddings that body and head share.*Use parallel.pp=1",
        ),
        ({"parallel": {}, "stage": 3, "compile": True}, "train.compile=true with ZeRO stage 3.*Use --ds_config zero1"),
    ],
)
def test_others_are_refused_with_the_remedy(case, message):
    with pytest.raises(ConfigError, match=message):
        check(**case)


def test_classes_are_not_cut():
    check({"tp": 2}, {"cond_length": 1, "cond_vocab_size": 7})


@pytest.mark.parametrize("source", ["body_input", "head_input"])
def test_learned_embeddings_of_one_side_may_be_piped(source):
    check({"pp": 2}, {source: "learned"})


def test_ranks_that_are_left_are_data_parallel():
    assert ParallelConfig(tp=2, pp=3).data_parallel_size(24) == 4
