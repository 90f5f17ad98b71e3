"""The demo's judge: each number moves the way its name says."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

DEMO = Path(__file__).parents[3] / "tools" / "demo"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


digits, judge = load("digits"), load("judge")


@pytest.fixture(scope="module")
def real():
    return {
        part: (judge.grey([digits.enlarged(scan) for scan, _ in scans]), [digit for _, digit in scans])
        for part, scans in digits.split().items()
    }


def test_the_parts_are_disjoint_and_hold_all_digits():
    parts = digits.split()
    assert {name: len(scans) for name, scans in parts.items()} == {"train": 1442, "validation": 355}
    assert all({digit for _, digit in scans} == set(range(10)) for scans in parts.values())


def test_every_wording_names_its_digit_and_no_other():
    captions = {(digit, wording): digits.caption(digit, wording) for digit in range(10) for wording in range(8)}
    assert len(set(captions.values())) == 80
    assert captions[7, 0] == "a handwritten seven"


def test_real_digits_judged_as_drawn_score_like_real_ones(real):
    result = judge.compare(real["validation"], real["train"], real["validation"])
    assert result.prompt_accuracy == result.real_accuracy > 0.95
    assert result.diversity == pytest.approx(1.0)
    assert result.novelty == pytest.approx(1.0)


def test_pictures_of_other_digits_than_asked_for_score_near_chance(real):
    pictures, shown = real["validation"]
    wrong = np.random.default_rng(1).permutation(shown).tolist()
    assert judge.compare((pictures, wrong), real["train"], real["validation"]).prompt_accuracy < 0.2


def test_copies_of_training_pictures_have_no_novelty(real):
    pictures, shown = real["train"]
    assert judge.compare((pictures[:200], shown[:200]), real["train"], real["validation"]).novelty < 1e-6


def test_one_picture_for_each_digit_is_neither_diverse_nor_distinct(real):
    pictures, shown = real["validation"]
    first = [shown.index(digit) for digit in range(10)] * 5
    result = judge.compare((pictures[first], [shown[i] for i in first]), real["train"], real["validation"])
    assert result.distinct_images == 10
    assert result.diversity < 1e-6
