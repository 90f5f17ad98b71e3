"""ImageGenerator: pictures in order, the settings in force, and what a model cannot be asked for."""

import logging

import numpy as np
import pytest
import torch

import megarq
from megarq.errors import ConfigError
from megarq.inference.generator import ImageGenerator, to_pictures

CHANGES = {
    "text": {},
    "class": {"cond_length": 1, "cond_vocab_size": 5},
    "none": {"cond_length": 1, "cond_vocab_size": 1},
}


@pytest.fixture(scope="module")
def folders(build, export, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: export(build(**changes), root / name) for name, changes in CHANGES.items()}


@pytest.fixture
def text(folders):
    return megarq.ImageGenerator.from_pretrained(folders["text"], device="cpu", dtype=torch.float32)


@pytest.fixture
def classes(folders):
    return ImageGenerator.from_pretrained(folders["class"])


@pytest.fixture
def unconditional(folders):
    return ImageGenerator.from_pretrained(folders["none"])


def same(left, right):
    return len(left) == len(right) and all(
        np.array_equal(*map(np.asarray, pair)) for pair in zip(left, right, strict=True)
    )


def test_pictures_come_prompt_by_prompt(text):
    pictures = text.generate(prompts=["a seven", "two"], count=3, seed=4)
    cond = torch.tensor([[2, 3, 0, 0]] * 3 + [[4, 0, 0, 0]] * 3)
    codes = text.sample_codes(cond, seed=4)
    assert same(pictures, to_pictures(text.rqvae.decode(codes)))


def test_pictures_are_rgb_of_the_rqvaes_resolution(text):
    assert [(picture.mode, picture.size) for picture in text.generate(prompts="a seven")] == [("RGB", (4, 4))]


def test_the_same_seed_gives_the_same_pictures(text):
    assert same(text.generate(prompts=["two"], count=4, seed=9), text.generate(prompts=["two"], count=4, seed=9))


def test_the_batch_size_does_not_change_the_pictures(folders, text):
    small = ImageGenerator.from_pretrained(folders["text"], batch_size=2)
    assert same(small.generate(prompts=["two"], count=5), text.generate(prompts=["two"], count=5))


def test_bf16_draws_pictures(folders):
    generator = ImageGenerator.from_pretrained(folders["text"], dtype=torch.bfloat16)
    assert len(generator.generate(prompts=["two"], count=2)) == 2


def test_a_model_in_bf16_decodes_in_bf16_and_encodes_in_fp32(folders, text):
    rounded = ImageGenerator.from_pretrained(folders["text"], dtype=torch.bfloat16)
    codes = text.sample_codes(text.conditions(["two"] * 8), seed=1)
    theirs, ours = (
        np.stack([np.asarray(picture, np.int16) for picture in generator.decode(codes)])
        for generator in (text, rounded)
    )
    assert 0 < np.abs(ours - theirs).mean() < 2
    images = text.rqvae.decode(codes)
    assert torch.equal(rounded.rqvae.encode(images), text.rqvae.encode(images))


def test_fewer_depths_decode_to_coarser_pictures(text):
    codes = text.sample_codes(text.conditions(["two"]), seed=1)
    for depth in (1, 2, 3):
        assert same(text.decode(codes, depth), to_pictures(text.rqvae.decode(codes, depth)))
    assert not same(text.decode(codes, 1), text.decode(codes)) and same(text.decode(codes, 3), text.decode(codes))


GUIDED = {"prompts": ["a seven"], "count": 8, "seed": 2}


def test_guidance_is_held_against_the_empty_caption(text):
    assert same(text.generate(**GUIDED, guidance=1), text.generate(**GUIDED))
    assert not same(text.generate(**GUIDED, guidance=4), text.generate(**GUIDED))
    empty = torch.tensor([text.tokenizer.encode("", 4)] * 8)
    unguided = text.decode(text.sample_codes(empty, seed=2))
    assert same(text.generate(**GUIDED, guidance=0), unguided)


@pytest.mark.parametrize("guidance", [-1, 1001, 1e39, float("nan"), float("inf"), "much"])
def test_guidance_that_is_no_scale_is_refused(text, guidance):
    with pytest.raises(ConfigError, match="guidance=.*: give a number from 0 to 1000"):
        text.generate(**GUIDED, guidance=guidance)


def test_prompts_that_are_no_list_are_refused(text):
    with pytest.raises(ConfigError, match="prompts=5: give a caption, or a list of captions"):
        text.generate(prompts=5)
    assert same(text.generate(prompts=(prompt for prompt in ("two", "a seven"))), text.generate(["two", "a seven"]))


def test_guidance_of_classes_is_refused(classes):
    with pytest.raises(ConfigError, match=r"guidance=2: the model's condition is class, .* Use guidance 1"):
        classes.generate(classes=[1], guidance=2)


def test_classes_come_class_by_class(classes):
    pictures = classes.generate(classes=[3, 1], count=2)
    codes = classes.sample_codes(torch.tensor([[3], [3], [1], [1]]))
    assert same(pictures, to_pictures(classes.rqvae.decode(codes)))


def test_classes_may_come_in_an_array(classes):
    assert same(classes.generate(classes=np.array([3, 1])), classes.generate(classes=[3, 1]))


def test_one_class_needs_no_list(classes):
    assert same(classes.generate(classes=3), classes.generate(classes=[3]))


def test_a_model_without_condition_needs_no_question(unconditional):
    assert len(unconditional.generate(count=3)) == 3


def test_settings_left_out_are_the_folders(text):
    text.sampling.top_k = 1
    greedy = text.generate(prompts=["two"], count=2, top_k=1)
    assert same(text.generate(prompts=["two"], count=2), greedy)
    assert not same(text.generate(prompts=["two"], count=2, top_k=12), greedy)


def test_settings_may_differ_per_depth(text):
    cond = torch.tensor([[2, 3, 0, 0]] * 20)
    codes = text.sample_codes(cond, top_k=[1, 12, 1])
    assert len(codes[:, 0, 0, 0].unique()) == 1
    assert len(codes[:, 0, 0, 1].unique()) > 1


def test_progress_counts_every_stack(text):
    told = []
    text.generate(prompts=["two"], count=3, progress=told.append)
    assert sum(told) == 3 * text.positions


def test_a_long_prompt_is_cut_with_a_warning(text, caplog):
    with caplog.at_level(logging.WARNING):
        cond = text.conditions(["a small red seven two"])
    assert cond.tolist() == [[2, 7, 5, 3]]
    assert "has 5 tokens; the model reads the first 4" in caplog.text


def test_pictures_are_clamped_to_eight_bits():
    images = torch.tensor([-3.0, -1.0, 0.0, 1.0, 7.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert np.asarray(to_pictures(images)[0])[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_one_channel_makes_grey_pictures():
    assert to_pictures(torch.zeros(2, 1, 4, 4))[1].mode == "L"


@pytest.mark.parametrize(
    ("kind", "question", "message"),
    [
        ("text", {}, "neither prompts nor classes given.*prompts"),
        ("text", {"classes": [1]}, "classes given.*prompts"),
        ("text", {"prompts": ["two"], "classes": [1]}, "both given"),
        ("text", {"prompts": []}, "empty list"),
        ("text", {"prompts": ["two", " "]}, "prompt ' '"),
        ("text", {"prompts": [3]}, "prompt 3"),
        ("text", {"prompts": ["two"], "count": 0}, "count=0"),
        ("text", {"prompts": ["two"], "count": 1.5}, "count=1.5"),
        ("text", {"prompts": ["two"], "count": 10**9}, "count=1000000000 of 1 prompts .* at most 1,000,000 pictures"),
        ("text", {"prompts": ["two"], "count": 10**30}, "at most 1,000,000 pictures"),
        ("text", {"prompts": ["two"] * 3, "count": 400_000}, "count=400000 of 3 prompts"),
        ("text", {"prompts": "a" * 1001}, "prompt of 1001 characters: give at most 1000"),
        ("text", {"prompts": ["two", "\ud800"]}, r"prompt '\\ud800' is no text"),
        ("text", {"prompts": ["two"], "top_k": 0}, "top_k=0"),
        ("text", {"prompts": ["two"], "temperature": float("nan")}, "temperature=nan"),
        ("text", {"prompts": ["two"], "seed": "x"}, "seed='x'"),
        ("class", {"prompts": ["two"]}, "prompts given.*classes"),
        ("class", {"classes": [5]}, "class=5.*0 to 4"),
        ("class", {"classes": [-1]}, "class=-1"),
        ("class", {"classes": ["cat"]}, "class='cat'"),
        ("class", {"classes": []}, "empty list"),
        ("none", {"prompts": ["two"]}, "prompts given.*neither"),
    ],
)
def test_what_a_model_cannot_be_asked_for_is_refused(folders, kind, question, message):
    with pytest.raises(ConfigError, match=message):
        ImageGenerator.from_pretrained(folders[kind]).generate(**question)


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_a_batch_size_of_no_pictures_is_refused(folders, size):
    with pytest.raises(ConfigError, match=f"batch_size={size}"):
        ImageGenerator.from_pretrained(folders["text"], batch_size=size)


@pytest.mark.parametrize("indices", [[0], [0, 1, 2], ["a", "b"]])
def test_indices_that_do_not_fit_the_conditions_are_refused(text, indices):
    with pytest.raises(ConfigError, match="indices"):
        text.sample_codes(text.conditions(["two", "two"]), indices=indices)


def test_prompts_without_a_tokenizer_are_refused(text):
    text.tokenizer = None
    with pytest.raises(ConfigError, match="without a tokenizer"):
        text.generate(prompts=["two"])
