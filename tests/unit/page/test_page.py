"""What the page does with what is typed into it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from megarq.errors import ConfigError
from megarq.page.page import HISTORY, LONGEST_FIELD, LONGEST_PROMPT, VISITS, Asked, Stopped


def quiet(drawn, total):
    """Nobody looks."""


def same(left, right):
    return [picture.tobytes() for picture in left] == [picture.tobytes() for picture in right]


def alike(left, right):
    """But for the rounding of a batch of another size."""
    np.testing.assert_allclose(np.asarray(left, int), np.asarray(right, int), atol=1)


def test_a_drawing_is_the_generators(page):
    drawing = page.draw(
        page.visit("a"),
        Asked("two", "3", temperature="1.5,1,0.5", top_k="5", top_p="0.9", guidance="2", seed="7"),
        quiet,
    )
    settings = {"temperature": [1.5, 1, 0.5], "top_k": 5, "top_p": 0.9, "guidance": 2.0, "seed": 7}
    assert same(drawing.pictures, page.generator.generate(prompts="two", count=3, **settings))
    assert drawing.facts == {"prompts": ["two"], "count": 3, **settings, **page.generator.facts}


@pytest.mark.parametrize(
    ("changes", "subject", "facts"),
    [
        ({"cond_length": 1, "cond_vocab_size": 5}, "3", {"classes": [3]}),
        ({"cond_length": 1, "cond_vocab_size": 1}, "", {}),
    ],
    ids=["class", "none"],
)
def test_models_of_classes_and_of_nothing_are_asked_as_they_can_be(make_page, changes, subject, facts):
    page = make_page(**changes)
    drawing = page.draw(page.visit("a"), Asked(subject, "2", seed="7"), quiet)
    assert facts.items() <= drawing.facts.items() and ("classes" in drawing.facts) == ("classes" in facts)
    asked = {name: value[0] for name, value in facts.items()}
    assert same(drawing.pictures, page.generator.generate(**asked, count=2, seed=7))


def test_empty_fields_are_the_models_settings_and_a_random_seed(page):
    page.generator.sampling.top_p, page.generator.sampling.temperature = 0.5, 2.0
    visit = page.visit("a")
    first, second = (page.draw(visit, Asked("two"), quiet) for _ in range(2))
    assert (first.facts["top_k"], first.facts["top_p"], first.facts["temperature"]) == (12, 0.5, 2.0)
    assert first.facts["seed"] != second.facts["seed"]
    again = page.draw(visit, first.asked, quiet)
    assert same(again.pictures, first.pictures)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"subject": " "}, r"prompt ' ': give a caption"),
        ({"subject": "a" * (LONGEST_PROMPT + 1)}, f"subject of 1001 characters: give at most {LONGEST_PROMPT}"),
        ({"count": "1000000000"}, "count=1000000000: give 1 to 6 pictures"),
        ({"count": "0"}, "count=0: give 1 to 6"),
        ({"count": ""}, "count='': give a whole number"),
        ({"count": "1" * 5000}, f"count of 5000 characters: give at most {LONGEST_FIELD}"),
        ({"top_k": "0"}, "top_k=0: give a whole number from 1"),
        ({"top_k": "1,2"}, "2 values for 3 depths"),
        ({"top_p": "1.1"}, "top_p=1.1: give a share"),
        ({"temperature": "nan"}, "temperature=nan: give a number"),
        ({"temperature": "warm"}, "temperature='warm': give a number"),
        ({"guidance": "inf"}, "guidance=inf: give a number from 0 to 1000"),
        ({"seed": "1.5"}, "seed='1.5': give a whole number"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_leaves_no_trace(page, fields, message):
    visit = page.visit("a")
    with pytest.raises(ConfigError, match=message):
        page.draw(visit, Asked(**{"subject": "two", **fields}), quiet)
    assert not visit.drawings and visit.shown is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked("5"), "class=5: this model knows classes 0 to 4"),
        (Asked("-1"), "class=-1: give a whole number of 0 or more"),
        (Asked(""), "class='': give a whole number"),
        (Asked("1", guidance="2"), "guidance=2.0: the model's condition is class"),
    ],
)
def test_what_a_model_of_classes_cannot_follow_is_refused(make_page, asked, message):
    page = make_page(cond_length=1, cond_vocab_size=5)
    with pytest.raises(ConfigError, match=message):
        page.draw(page.visit("a"), asked, quiet)


@pytest.mark.parametrize("part", ["sampler", "decoder"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("made up"), RuntimeError("DefaultCPUAllocator: can't allocate memory: made up")]
)
def test_pictures_that_do_not_fit_the_memory_are_refused(page, monkeypatch, part, error):
    def full(*given, **settings):
        raise error

    monkeypatch.setattr(
        *{"sampler": (page.generator._sampler, "draw"), "decoder": (page.generator.rqvae, "decode")}[part], full
    )
    with pytest.raises(ConfigError, match="3 pictures do not fit the memory that is left: ask for fewer"):
        page.draw(page.visit("a"), Asked("two", "3"), quiet)
    assert not page.visit("a").drawings


def test_a_prompt_of_more_tokens_than_the_model_reads_is_told(page):
    short, long = (page.draw(page.visit("a"), Asked(prompt), quiet) for prompt in ("two", "two " * 40))
    assert page.cut(short) is None and page.cut(long) == page.generator.tokenizer.count("two " * 40) > 4


def test_progress_counts_stacks_to_the_total(page):
    told = []
    page.draw(page.visit("a"), Asked("two", "3"), lambda drawn, total: told.append((drawn, total)))
    assert told == [(3, 12), (6, 12), (9, 12), (12, 12)]


def test_a_visit_that_stops_ends_its_drawing_and_no_others(page):
    visit, other = page.visit("a"), page.visit("b")
    told = []

    def stop(drawn, total):
        told.append(drawn)
        visit.stopping = True

    with pytest.raises(Stopped):
        page.draw(visit, Asked("two"), stop)
    assert told == [1] and not visit.drawings
    page.draw(other, Asked("two"), quiet)
    visit.stopping = False
    page.draw(visit, Asked("two"), quiet)
    assert len(visit.drawings) == len(other.drawings) == 1


def test_closing_stops_all_visits(page):
    visits = [page.visit("a"), page.visit("b")]
    page.close()
    assert all(visit.stopping for visit in visits) and page.visit("a") is not visits[0]


def test_a_visit_keeps_its_newest_drawings_newest_first(page):
    visit = page.visit("a")
    for seed in range(HISTORY + 2):
        page.draw(visit, Asked("two", seed=str(seed)), quiet)
    assert [drawing.facts["seed"] for drawing in visit.drawings] == list(range(HISTORY + 1, 1, -1))
    assert visit.shown is visit.drawings[0] and page.visit("a") is visit


def test_of_too_many_visits_the_one_that_was_away_longest_is_forgotten(page):
    first, second = page.visit("0"), page.visit("1")
    for number in range(2, VISITS):
        page.visit(str(number))
    assert page.visit("0") is first
    page.visit(str(VISITS))
    assert second.stopping and not first.stopping
    assert page.visit("0") is first and page.visit("1") is not second


def test_of_too_many_pictures_the_oldest_are_forgotten_whoever_drew_them(page, monkeypatch):
    monkeypatch.setattr("megarq.page.page.KEPT", 5)
    ada, bob = page.visit("ada"), page.visit("bob")
    for visit, count in ((ada, "2"), (bob, "2"), (ada, "1"), (bob, "2")):
        page.draw(visit, Asked("two", count), quiet)
    assert [len(drawing.pictures) for drawing in ada.drawings] == [1]
    assert [len(drawing.pictures) for drawing in bob.drawings] == [2, 2]


def test_a_picture_is_refined_depth_by_depth(page):
    drawing = page.draw(page.visit("a"), Asked("two", "2"), quiet)
    refined = page.refine(drawing, 1)
    for ours, theirs in zip(
        refined, [page.generator.decode(drawing.codes, depth)[1] for depth in (1, 2, 3)], strict=True
    ):
        alike(ours, theirs)
    alike(refined[-1], drawing.pictures[1])
    assert not same(refined[:1], refined[1:2])


def test_a_saved_picture_tells_how_to_draw_it_again(page, tmp_path):
    drawing = page.draw(page.visit("a"), Asked("two", "2", top_k="5", seed="9"), quiet)
    path = drawing.save(1, tmp_path)
    assert path.name == "megarq-9-1.png"
    with Image.open(path) as picture:
        text = {name: text for name, text in picture.text.items() if name != "Software"}
        assert text.pop("dtype") == "float32"
        facts = {name: json.loads(text) for name, text in text.items()}
        assert facts.pop("model") == page.generator.facts["model"]
        index, question = facts.pop("index"), {name: facts.pop(name) for name in ("prompts", "count")}
        assert same([picture], [page.generator.generate(**question, **facts)[index]])
    assert index == 1 and facts["top_k"] == 5
