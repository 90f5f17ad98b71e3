"""When the alarms of an RQ-VAE's training speak, on made-up curves."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from megarq.config.run import HealthConfig
from megarq.rqvae.alarms import Alarm, Alarms, Smoothed

SMOOTHING = 5
SIZES = (64, 256)


def alarms(adversarial: str = "hinge", **changes: Any) -> Alarms:
    return Alarms(HealthConfig(**{"smoothing": SMOOTHING, **changes}), adversarial, SIZES)


def spoken(watched: Alarms, lines: Iterable[Mapping[str, Any]]) -> dict[int, list[str]]:
    """Warnings by the number of the line, counted from 0, where there are any."""
    return {index: found for index, line in enumerate(lines) if (found := watched.see(line))}


def losses(*values: float | None) -> list[dict[str, Any]]:
    return [{"reconstruction_loss": value} for value in values]


def use(depth: str, usage: float = 1.0, perplexity: float = 64.0) -> dict[str, Any]:
    """Of the codebook of a depth, or "" for a shared one."""
    return {"reconstruction_loss": 1.0, f"usage{depth}": usage, f"perplexity{depth}": perplexity}


def usages(*values: float) -> list[dict[str, Any]]:
    return [use("_1", usage=value) for value in values]


def perplexities(*values: float, depth: str = "_1") -> list[dict[str, Any]]:
    return [use(depth, perplexity=value) for value in values]


def logits(*pairs: tuple[float | None, float | None], weight: float = 1.0) -> list[dict[str, Any]]:
    return [
        {"reconstruction_loss": 1.0, "logits_real": real, "logits_fake": fake, "adaptive_weight": weight}
        for real, fake in pairs
    ]


def test_an_alarm_speaks_again_only_after_it_has_cleared():
    alarm = Alarm()
    values = [0.5, 1.1, 1.5, 0.95, 1.1, 0.85, 0.99, 1.01]
    assert [alarm.rings(value, 1.0) for value in values] == [False, True, False, False, False, False, False, True]


def test_a_smoothed_value_waits_for_enough_values_and_does_not_lean_to_zero():
    smoothed = Smoothed(4)
    assert [smoothed.add(3.0) for _ in range(5)] == [None, None, None, pytest.approx(3.0), pytest.approx(3.0)]


def test_a_healthy_run_is_silent():
    lines = [
        {
            "reconstruction_loss": 1 / (step + 1),
            **{"usage_1": 0.9, "perplexity_1": min(1.0 + 8 * step, 40.0)},
            **{"usage_2": min(0.8, 0.1 * step), "perplexity_2": min(1.0 + 30 * step, 200.0)},
            **{"logits_real": 0.5, "logits_fake": -0.5, "adaptive_weight": 0.3},
        }
        for step in range(60)
    ]
    assert spoken(alarms(), lines) == {}


def test_usage_below_half_of_its_best_is_told_once():
    found = spoken(alarms(), usages(0.6, 0.8, 0.7, 0.39, 0.3, 0.2))
    assert list(found) == [3]
    assert found[3] == [
        "39% of the codes are used at depth 1, 80% were at best: the codebook collapses. Lower train.lr, or start anew "
        "with codebook.init=kmeans"
    ]


def test_usage_that_recovers_and_falls_again_is_told_again():
    assert list(spoken(alarms(), usages(0.8, 0.3, 0.7, 0.3))) == [1, 3]


def test_each_depth_has_its_own_best():
    watched = alarms()
    lines = [use("_1", 0.9) | use("_2", second) for second in (0.4, 0.3, 0.1)]
    found = spoken(watched, lines)
    assert list(found) == [2] and "at depth 2, 40% were at best" in found[2][0]


@pytest.mark.parametrize(("floor", "told"), [(0.0, []), (0.3, [2]), (0.9, [1])])
def test_the_floor_of_usage_is_configured(floor, told):
    assert list(spoken(alarms(usage_floor=floor), usages(1.0, 0.6, 0.1, 0.0))) == told


def test_a_codebook_that_was_never_used_well_is_told():
    found = spoken(alarms(), perplexities(2.0, 6.3, 6.3, 7.2, 6.3))
    assert found == {
        1: [
            "the perplexity of the 64 codes is 6.3 at depth 1, below 6.4: the codebook collapses. Lower train.lr, or "
            "start anew with codebook.init=kmeans"
        ],
        4: found[1],
    }


def test_each_codebook_has_a_floor_of_its_size():
    assert spoken(alarms(), perplexities(30.0, 30.0)) == {}
    found = spoken(alarms(), perplexities(25.0, 25.0, depth="_2"))
    assert list(found) == [1] and found[1][0].startswith(
        "the perplexity of the 256 codes is 25.0 at depth 2, below 25.6"
    )


@pytest.mark.parametrize(("floor", "told"), [(0.0, []), (0.05, [2]), (0.5, [1])])
def test_the_floor_of_perplexity_is_configured(floor, told):
    assert list(spoken(alarms(perplexity_floor=floor), perplexities(9.0, 9.0, 2.0))) == told


def test_a_shared_codebook_is_judged_over_all_depths():
    depths = [use("_1", 0.9, 60.0) | use("_2", second, 2.0) for second in (0.9, 0.1)]
    assert spoken(alarms(), [each | use("", 1.0, 60.0) for each in depths]) == {}
    found = spoken(alarms(), [each | use("", usage, 6.0) for each, usage in zip(depths, (1.0, 0.1), strict=True)])
    assert [warning.partition(":")[0] for warning in found[1]] == [
        "10% of the codes are used, 100% were at best",
        "the perplexity of the 64 codes is 6.0, below 6.4",
    ]


def test_a_depth_of_a_shared_codebook_is_held_against_its_own_best():
    pairs = [(20.0, 1.0), (60.0, 40.0), (20.0, 4.1), (20.0, 3.9), (20.0, 3.0)]
    lines = [use("", perplexity=60.0) | use("_1", 0.9, first) | use("_2", 0.9, second) for first, second in pairs]
    assert spoken(alarms(), lines) == {
        3: [
            "the perplexity of the 256 codes is 3.9 at depth 2, 40.0 at best: the codebook collapses. Lower train.lr, "
            "or start anew with codebook.init=kmeans"
        ]
    }
    assert spoken(alarms(perplexity_floor=0.0), lines) == {}


def test_a_reconstruction_that_diverges_is_told_once():
    found = spoken(alarms(), losses(*[0.1] * 20, *[0.5] * 20))
    assert len(found) == 1
    (step,), (warning,) = found.keys(), found.values()
    assert 20 <= step < 25
    assert warning[0].startswith("reconstruction_loss is 0.2") and "it was 0.1 at best: it diverges" in warning[0]


def test_one_bad_batch_does_not_ring():
    assert spoken(alarms(), losses(*[0.1] * 20, 0.45, *[0.1] * 20)) == {}


def test_the_first_losses_of_a_run_are_not_its_best():
    assert spoken(alarms(), losses(1e-6, *[1.0] * 20)) == {}


def test_a_reconstruction_may_rise_where_nobody_minds():
    assert spoken(alarms(reconstruction_rise=None), losses(*[0.1] * 20, *[9.0] * 20)) == {}


def test_a_reconstruction_may_rise_when_the_discriminator_joins_and_not_later():
    before, joined, later = losses(*[0.1] * 20), logits(*[(0.5, -0.5)] * 20), logits(*[(0.5, -0.5)] * 20)
    rise = [line | {"reconstruction_loss": 0.5} for line in joined]
    assert spoken(alarms(), [*before, *rise]) == {}
    found = spoken(alarms(), [*before, *rise, *[line | {"reconstruction_loss": 2.0} for line in later]])
    assert len(found) == 1 and min(found) >= 40


@pytest.mark.parametrize(
    ("adversarial", "real", "fake", "told"),
    [
        ("hinge", 1.3, -1.2, True),
        ("hinge", 5.0, -0.5, True),
        ("hinge", 5.0, 3.5, False),
        ("hinge", 1.3, 1.2, False),
        ("vanilla", 1.3, -1.2, False),
        ("vanilla", 4.5, -6.0, True),
    ],
)
def test_a_discriminator_that_tells_both_far_apart_is_told(adversarial, real, fake, told):
    found = spoken(alarms(adversarial), logits(*[(0.1, 0.0)] * 10, *[(real, fake)] * 60))
    assert len(found) == told
    assert all("it is too sure to learn or to teach" in each[0] for each in found.values())


def test_the_bound_of_logits_is_configured():
    assert spoken(alarms(logits=2.0), logits(*[(1.9, -1.9)] * 20)) == {}
    assert len(spoken(alarms(logits=1.5), logits(*[(1.9, -1.9)] * 20))) == 1


@pytest.mark.parametrize(("weight", "told"), [(1e4, True), (9.5e3, True), (8e3, False)])
def test_a_lambda_at_its_clamp_is_told_once(weight, told):
    found = spoken(alarms(), logits(*[(0.1, 0.0)] * 20, weight=weight))
    assert list(found) == [SMOOTHING - 1] * told
    assert all(
        "clamped at 10000: the discriminator gives the reconstruction no gradient" in each[0] for each in found.values()
    )


def test_logits_are_judged_from_the_start_of_the_discriminator_on():
    found = spoken(alarms(), logits(*[(None, None)] * 10, *[(1.5, -1.5)] * 10))
    assert list(found) == [10 + SMOOTHING - 1]


def test_lines_of_validations_are_passed_over():
    assert spoken(alarms(), [{"validation_loss": 3.0}, *losses(*[1.0] * 6), {"validation_loss": 9.0}]) == {}


def test_a_run_that_goes_on_knows_its_best():
    lines = [*usages(*[0.8] * 6), *usages(0.3, 0.2)]
    whole, resumed = alarms(), alarms()
    expected = spoken(whole, lines)
    for line in lines[:4]:
        resumed.see(line)
    assert (
        [warning for found in spoken(resumed, lines[4:]).values() for warning in found]
        == [warning for found in expected.values() for warning in found]
        != []
    )
