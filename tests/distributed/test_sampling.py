"""A model that ranks share is loaded part by part, answers and draws as on one."""

from pathlib import Path

import pytest
import torch
from cut_layers import SIZES, check, own, tensor_group
from tiny_models import build_models, export_models, write_tokenizer

from megarq.config.models import StackConfig
from megarq.inference.frozen import Form, Int8Weight, PackedWeight
from megarq.inference.generator import ImageGenerator
from megarq.inference.pretrained import load_pretrained

FOUR_HEADS = {"body": StackConfig(layers=2, heads=4), "head": StackConfig(layers=2, heads=4)}
MODELS = {
    "captions": {},
    "classes, sizes per depth": {
        "cond_length": 1,
        "codebook_sizes": [12, 4, 8],
        "body_input": "learned",
        "head_input": "learned",
        "shared_embedding": False,
        "shared_classifier": False,
    },
}


def check_logits(folder: Path, form: Form | None) -> None:
    cut = load_pretrained(folder, form=form, tp=tensor_group()).transformer
    whole = load_pretrained(folder).transformer
    codes = torch.stack([torch.arange(12).view(3, 2, 2) % size for size in whole.config.sizes], dim=-1)
    cond = torch.arange(3 * whole.config.cond_length).view(3, -1) % whole.config.cond_vocab_size
    ours, theirs = cut(codes, cond)[0], own(whole(codes, cond)[0])
    if form is Int8Weight:  # each rank scales the rows of its part
        torch.testing.assert_close(ours, theirs, atol=0.15, rtol=0.15)
    else:
        check(ours, theirs, "logits")


def check_pictures(folder: Path) -> None:
    shared = ImageGenerator.from_pretrained(folder, tp=tensor_group())
    alone = ImageGenerator.from_pretrained(folder)
    asked = {"prompts": ["a seven", "two"], "count": 3, "top_k": 5, "top_p": 0.9, "seed": 4, "guidance": 2.0}
    for ours, theirs in zip(shared.generate(**asked), alone.generate(**asked), strict=True):
        assert ours.tobytes() == theirs.tobytes()


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    return export_models(
        build_models(**FOUR_HEADS, **MODELS[request.param]),
        tmp_path / "model",
        tokenizer_file=write_tokenizer(tmp_path),
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", [None, PackedWeight, Int8Weight])
def test_logits_of_a_shared_model_are_those_of_the_whole_one(rank_group, folder, form, size):
    rank_group(size).run(check_logits, folder, form)


@pytest.mark.parametrize("size", SIZES)
def test_a_shared_model_draws_the_pictures_of_the_whole_one(rank_group, tmp_path, size):
    folder = export_models(build_models(**FOUR_HEADS), tmp_path / "model", tokenizer_file=write_tokenizer(tmp_path))
    rank_group(size).run(check_pictures, folder)
