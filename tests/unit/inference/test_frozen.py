"""Weights in other forms: what they multiply to, how they are loaded, and what they weigh."""

import pytest
import torch
import torch.nn.functional as F

from megarq.inference.frozen import Int8Weight, PackedWeight, fastest_form, freezable
from megarq.inference.pretrained import load_pretrained

FORMS = [PackedWeight, Int8Weight]


def test_the_fastest_form_rounds_nothing_and_is_the_cpus_alone():
    assert fastest_form(torch.device("cpu"), torch.float32) is PackedWeight
    assert fastest_form(torch.device("cpu"), torch.float16) is None
    assert fastest_form(torch.device("cuda"), torch.bfloat16) is None


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)])
def test_a_packed_weight_multiplies_as_the_weight_does(shape):
    x, weight, bias = torch.randn(shape), torch.randn(7, 16), torch.randn(7)
    torch.testing.assert_close(PackedWeight(weight)(x, bias), F.linear(x, weight, bias))
    torch.testing.assert_close(PackedWeight(weight)(x, None), F.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_8_bit_weight_is_off_by_half_a_step_of_its_row(dtype):
    weight = (torch.randn(7, 16) * torch.logspace(-3, 3, 7).unsqueeze(1)).to(dtype)
    weight[3] = 0
    read = Int8Weight(weight)(torch.eye(16, dtype=dtype), None).t()
    steps = weight.float().abs().amax(-1, keepdim=True) / 127
    rounding = 1e-6 if dtype == torch.float32 else 2**-7
    assert ((read - weight).float().abs() <= steps / 2 + rounding * weight.float().abs()).all()
    assert not torch.equal(read, weight)


@pytest.mark.parametrize("form", FORMS)
def test_a_loaded_model_answers_as_its_parameters_do(form, variant, export, random_inputs, tmp_path):
    frozen = load_pretrained(export(variant, tmp_path / "model"), form=form).transformer
    codes, cond = random_inputs(frozen.config)
    tolerance = 1e-4 if form is PackedWeight else 0.15
    for ours, theirs in zip(frozen(codes, cond), variant.transformer(codes, cond), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    losses = frozen(codes, cond, codes)[0]
    torch.testing.assert_close(losses, variant.transformer(codes, cond, codes)[0], atol=tolerance, rtol=tolerance)


def test_a_frozen_layer_keeps_no_parameter(build, export, tmp_path):
    models = build()
    frozen = load_pretrained(export(models, tmp_path / "model"), form=Int8Weight).transformer
    names = {name for name, _ in models.transformer.named_parameters()} - {
        name for name, _ in frozen.named_parameters()
    }
    assert names == set(freezable(models.transformer)) and "body.0.attention.qkv.weight" in names
