"""Sampling: cached logits, the filters, the distribution of codes, and what is random about a picture."""

from contextlib import contextmanager
from itertools import product
from math import sqrt

import pytest
import torch

from megarq.errors import ConfigError
from megarq.inference.sampling import CodeSampler, Draws, Guidance, Sampler, sample_codes
from megarq.inference.settings import DepthSettings, depth_settings

ONE_POSITION = {"code_shape": [1, 2, 2], "codebook_size": 3, "cond_length": 1, "cond_vocab_size": 5}


def forced_logits(model, codes, cond, placed=False):
    """Logits [B, T * D, K] of cached steps along given codes, padded to the largest codebook."""
    flat, seen = codes.flatten(1, 2), []

    def choose(logits, position, depth):
        missing = max(model.config.sizes) - logits.shape[-1]
        seen.append(torch.nn.functional.pad(logits, (0, missing), value=-1e6))
        return flat[:, int(position), depth]

    assert torch.equal(Sampler(model, len(cond), choose, placed=placed).draw(cond), codes)
    return torch.stack(seen, dim=1)


@pytest.mark.parametrize("placed", [False, True], ids=["plain", "placed"])
def test_cached_logits_equal_the_full_forward_pass(variant, random_inputs, placed):
    model = variant.transformer
    codes, cond = random_inputs(model.config)
    full, _ = model(codes, cond)
    torch.testing.assert_close(forced_logits(model, codes, cond, placed), full.flatten(1, 3), atol=1e-4, rtol=1e-4)


def test_guided_logits_are_those_of_both_full_forward_passes(build, random_inputs):
    model = build().transformer
    codes, cond = random_inputs(model.config)
    null = torch.zeros(model.config.cond_length, dtype=torch.int64)
    seen = []

    def choose(logits, position, depth):
        seen.append(logits)
        return codes.flatten(1, 2)[:, position, depth]

    Sampler(model, len(cond), choose, Guidance(3.0, null)).draw(cond)
    conditional, without = model(codes, cond)[0], model(codes, null.expand_as(cond))[0]
    assert not torch.allclose(conditional, without, atol=1e-2)
    expected = (without + 3 * (conditional - without)).flatten(1, 3)
    torch.testing.assert_close(torch.stack(seen, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_a_sampler_draws_one_batch_after_another(build, random_inputs):
    model = build().transformer
    _, cond = random_inputs(model.config)
    other = (cond + 1) % model.config.cond_vocab_size
    settings = depth_settings(model.config.sizes)
    for placed in (False, True):
        draws = Draws(model, len(cond), settings)
        sampler = Sampler(model, len(cond), draws, placed=placed)
        for batch in (cond, other, cond):
            draws.seed(3, range(len(cond)))
            assert torch.equal(sampler.draw(batch), sample_codes(model, batch, seed=3))


def test_top_k_1_takes_the_likeliest_code_at_every_step(variant, random_inputs):
    model = variant.transformer
    _, cond = random_inputs(model.config)
    codes = sample_codes(model, cond, top_k=1)
    full, _ = model(codes, cond)
    assert torch.equal(full.argmax(-1), codes)


def test_codes_beyond_a_depths_own_codebook_are_never_drawn(build):
    model = build(shared_classifier=False, codebook_sizes=[12, 2, 3]).transformer
    codes = sample_codes(model, torch.zeros(50, 4, dtype=torch.int64), temperature=1000.0)
    assert codes.amax((0, 1, 2)).tolist() == [11, 1, 2]


@pytest.mark.parametrize(
    ("uniform", "code"), [(0.0, 0), (0.29, 0), (0.31, 1), (0.39, 1), (0.41, 2), (0.79, 2), (0.81, 3), (0.9999, 3)]
)
def test_a_draw_inverts_the_cumulated_probabilities(uniform, code):
    logits = torch.tensor([[0.3, 0.1, 0.4, 0.2]]).log()
    settings = DepthSettings(top_k=4, top_p=1 - 1e-9, temperature=1.0)
    assert settings.draw(logits, torch.tensor([uniform], dtype=torch.float64)).tolist() == [code]


def drawn(settings, probabilities, draws=2000):
    """Every code that equally spaced uniform numbers draw."""
    logits = torch.tensor(probabilities).log().expand(draws, -1)
    return set(settings.draw(logits, torch.arange(draws, dtype=torch.float64) / draws).tolist())


def test_top_k_keeps_exactly_k_codes_where_all_are_equal():
    assert len(drawn(DepthSettings(2, 1.0, 1.0), [0.25] * 4)) == 2


@pytest.mark.parametrize(
    ("top_p", "codes"), [(0.01, {0}), (0.49, {0}), (0.51, {0, 1}), (0.76, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, codes):
    assert drawn(DepthSettings(4, top_p, 1.0), [0.5, 0.25, 0.13, 0.12]) == codes


def test_top_p_counts_the_probabilities_that_top_k_left():
    assert drawn(DepthSettings(2, 0.6, 1.0), [0.5, 0.25, 0.25]) == {0}  # 2/3 and 1/3 are left of the three


def test_temperature_comes_before_top_p():
    assert drawn(DepthSettings(2, 0.85, 0.5), [0.7, 0.3]) == {0, 1}  # 0.845 and 0.155
    assert drawn(DepthSettings(2, 0.85, 0.4), [0.7, 0.3]) == {0}  # 0.893 and 0.107


def test_the_coldest_temperature_is_finite_arithmetic():
    assert drawn(DepthSettings(3, 1.0, 1e-6), [0.2, 0.5, 0.3]) == {1}


def test_a_code_of_probability_zero_is_not_drawn_at_the_end_of_the_range():
    logits = torch.tensor([[0.0, float("-inf"), 0.0, float("-inf")]])
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert DepthSettings(4, 1.0, 1.0).draw(logits, last).tolist() == [2]


def filtered(logits, top_k, top_p, temperature):
    """The probabilities [K] of one depth, worked out code by code."""
    weights = (logits.double() / temperature).exp()
    order = sorted(range(len(weights)), key=lambda code: -weights[code])[:top_k]
    kept, total = [], 0.0
    for code in order:
        kept.append(code)
        total += float(weights[code] / weights[order].sum())
        if total >= top_p:
            break
    probabilities = torch.zeros_like(weights)
    probabilities[kept] = weights[kept] / weights[kept].sum()
    return probabilities


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": None, "top_p": 1.0, "temperature": 1.0},
        {"top_k": [3, 2], "top_p": [0.95, 1.0], "temperature": [2.0, 1.5]},
    ],
)
def test_codes_are_drawn_with_the_models_probabilities(build, settings):
    """Chi-square of 6,000 pictures against the product of conditional probabilities over all 81 stacks."""
    model, draws = build(**ONE_POSITION).transformer, 6000
    stacks = torch.tensor(list(product(range(3), repeat=4)))  # every picture there can be [81, T * D]
    cond = torch.full((1, 1), 2)
    logits = model(stacks.view(-1, 1, 2, 2), cond.expand(len(stacks), 1))[0].view(len(stacks), 4, 3)
    each = depth_settings(model.config.sizes, **settings)
    expected = (
        torch.stack(
            [
                torch.stack(
                    [
                        filtered(row[i], each[i % 2].top_k, each[i % 2].top_p, each[i % 2].temperature)[stack[i]]
                        for i in range(4)
                    ]
                ).prod()
                for row, stack in zip(logits, stacks, strict=True)
            ]
        )
        * draws
    )
    codes = sample_codes(model, cond.expand(draws, 1), **settings, seed=3).flatten(1)
    counts = torch.bincount((codes * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81).double()
    assert float(expected.sum()) == pytest.approx(draws)
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    freedom = len(wanted) - 1
    assert freedom >= 8
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * sqrt(2 / (9 * freedom))) ** 3  # 99.9%, Wilson and Hilferty
    assert float(((observed - wanted).square() / wanted).sum()) < limit


def test_the_same_seed_gives_the_same_codes(build):
    model, cond = build().transformer, torch.ones(4, 4, dtype=torch.int64)
    assert torch.equal(sample_codes(model, cond, seed=5), sample_codes(model, cond, seed=5))


def test_another_seed_gives_other_codes(build):
    model, cond = build().transformer, torch.ones(4, 4, dtype=torch.int64)
    assert not torch.equal(sample_codes(model, cond, seed=5), sample_codes(model, cond, seed=6))


def test_pictures_of_one_batch_differ(build):
    codes = sample_codes(build().transformer, torch.ones(8, 4, dtype=torch.int64))
    assert len(codes.flatten(1).unique(dim=0)) == 8


def test_a_picture_depends_on_its_index_and_not_on_its_batch(build, random_inputs):
    model = build().transformer
    _, cond = random_inputs(model.config, batch=6)
    whole = sample_codes(model, cond, seed=1)
    parts = [sample_codes(model, cond[index : index + 1], seed=1, indices=[index]) for index in range(6)]
    assert torch.equal(torch.cat(parts), whole)


def test_progress_is_told_after_each_position(build):
    told = []
    sample_codes(build().transformer, torch.ones(3, 4, dtype=torch.int64), progress=told.append)
    assert told == [3, 3, 3, 3]


def test_a_training_model_samples_without_dropout_and_goes_on_training(build):
    model = build(dropout=0.9).transformer
    cond = torch.ones(2, 4, dtype=torch.int64)
    expected = sample_codes(model, cond)
    model.train()
    assert torch.equal(sample_codes(model, cond), expected)
    assert model.training and model.body["0"].dropout.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": -3}, "top_k=-3"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_k": True}, "top_k=True"),
        ({"top_k": "5"}, "top_k='5'"),
        ({"top_k": [1, 2]}, r"top_k=\[1, 2\]: 2 values for 3 depths"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"top_p": None}, "top_p=None"),
        ({"top_p": [0.5] * 4}, "4 values for 3 depths"),
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": []}, "0 values"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": "1"}, "seed='1'"),
        ({"seed": None}, "seed=None"),
        ({"indices": [0]}, "1 indices for 2 conditions"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_value(build, settings, message):
    with pytest.raises(ConfigError, match=message):
        sample_codes(build().transformer, torch.ones(2, 4, dtype=torch.int64), **settings)


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), r"\[2, 3\]"),
        (torch.ones(2, 4), "float32"),
        (torch.ones(0, 4, dtype=torch.int64), r"\[0, 4\]"),
        (torch.full((2, 4), 8), "cond holds 8.*0 to 7"),
        (torch.full((2, 4), -1), "cond holds -1"),
    ],
)
def test_a_condition_that_the_model_cannot_read_is_refused(build, cond, message):
    with pytest.raises(ConfigError, match=message):
        sample_codes(build().transformer, cond)


def test_top_k_is_capped_at_the_codebook():
    assert [each.top_k for each in depth_settings((12, 7), top_k=1000)] == [12, 7]


def test_one_value_in_a_list_serves_all_depths():
    assert [each.top_p for each in depth_settings((12, 7), top_p=[0.5])] == [0.5, 0.5]


@pytest.mark.parametrize("damaged", ["body.1.mlp.up.weight", "head.0.mlp.up.weight", "outputs.codes.linear.weight"])
@pytest.mark.parametrize("settings", [{}, {"top_k": 1}, {"top_p": 0.5}], ids=["all", "greedy", "nucleus"])
def test_damaged_weights_are_named_and_draw_nothing(build, damaged, settings):
    model = build().transformer
    dict(model.named_parameters())[damaged].data.view(-1)[-1] = float("nan")
    with pytest.raises(ConfigError, match="not finite"):
        sample_codes(model, torch.ones(2, 4, dtype=torch.int64), **settings)


def test_guidance_that_leaves_no_numbers_is_told(build):
    guidance = Guidance(1e39, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"not finite.*, or guidance=1e\+39 is too much for them"):
        sample_codes(build().transformer, torch.ones(2, 4, dtype=torch.int64), guidance=guidance)


@pytest.mark.parametrize("placed", [False, True], ids=["plain", "placed"])
def test_a_batch_that_is_not_finite_leaves_nothing_to_the_next(build, placed):
    model = build().transformer
    good, bad = torch.ones(2, 4, dtype=torch.int64), torch.full((2, 4), 3)
    draws = Draws(model, 2, depth_settings(model.config.sizes))
    draws.seed(0, [0, 1])
    sampler = Sampler(model, 2, draws, placed=placed)
    expected = sampler.draw(good)
    kept = model.body_input.condition.weight[3].clone()
    model.body_input.condition.weight[3] = float("inf")
    with pytest.raises(ConfigError, match="not finite"):
        sampler.draw(bad)
    model.body_input.condition.weight[3] = kept
    assert torch.equal(sampler.draw(good), expected)


def test_memory_that_runs_out_once_leaves_a_sampler_that_works(build, monkeypatch):
    model, settings = build().transformer, depth_settings((50, 50, 50))
    sampler, conditions = CodeSampler(model), [torch.ones(count, 4, dtype=torch.int64) for count in (2, 5)]
    expected = sampler.draw(conditions[0], settings, 0, [0, 1])
    with monkeypatch.context() as patch:
        patch.setattr("megarq.inference.sampling.Sampler", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            sampler.draw(conditions[1], settings, 0, range(5))
    assert torch.equal(sampler.draw(conditions[0], settings, 0, [0, 1]), expected)


def out_of_memory(*args, **options):
    raise torch.OutOfMemoryError("made up")


def test_steps_are_all_captured_or_none(build, monkeypatch):
    """By stand-ins for CUDA's graphs, of which the second finds no memory."""
    sampler, begun = Sampler(build().transformer, 2, lambda logits, position, depth: logits.argmax(-1), placed=True), []

    @contextmanager
    def capturing(graph, **options):
        begun.append(graph)
        if len(begun) == 2:
            out_of_memory()
        yield

    monkeypatch.setattr("torch.cuda.graph_pool_handle", object)
    monkeypatch.setattr("torch.cuda.CUDAGraph", object)
    monkeypatch.setattr("torch.cuda.graph", capturing)
    monkeypatch.setattr("megarq.inference.sampling._on_side_stream", lambda step, device: step())
    with pytest.raises(torch.OutOfMemoryError):
        sampler._capture()
    assert sampler._graphs == {}
    sampler._capture()
    assert len(sampler._graphs) == len(begun) - 2 > 1


def test_numbers_are_drawn_on_the_cpu_whatever_the_default_device(build):
    draws = Draws(build().transformer, 1, depth_settings((50, 50, 50)))
    draws.seed(3, [7])
    expected = draws._uniform.clone()
    with torch.device("meta"):
        draws.seed(3, [7])
    assert torch.equal(draws._uniform, expected)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0], ids=["all alike", "flat", "peaked"])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.92, 1 - 1e-6])
def test_top_p_of_a_large_codebook_keeps_what_sorting_all_of_it_keeps(scale, top_p):
    logits = scale * torch.randn(4, 5000, generator=torch.Generator().manual_seed(1))
    weights = logits.softmax(-1)
    kept = DepthSettings(5000, top_p, 1.0)._filtered(weights) > 0
    likeliest, codes = weights.sort(-1, descending=True)
    before = likeliest.double().cumsum(-1) - likeliest
    expected = torch.zeros_like(kept).scatter_(-1, codes, before < top_p * weights.double().sum(-1, keepdim=True))
    if scale:
        assert torch.equal(kept, expected)
    assert torch.equal(kept.sum(-1), expected.sum(-1))


@pytest.mark.parametrize("indices", [[0], [0, 1, 2], ["a", "b"], [0.5, 1]])
def test_indices_that_are_not_one_number_for_each_picture_are_refused(build, indices):
    with pytest.raises(ConfigError, match="give one for each|give whole numbers"):
        sample_codes(build().transformer, torch.ones(2, 4, dtype=torch.int64), indices=indices)
