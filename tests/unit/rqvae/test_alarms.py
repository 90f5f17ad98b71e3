"""When the alarms of an RQ-VAE's training speak, on made-up curves."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from megarq.config.run import HealthConfig
from megarq.rqvae.alarms import Alarm, Alarms, Smoothed

SMOOTHING = 5


def alarms(adversarial: str = "hinge", **changes: Any) -> Alarms:
    return Alarms(HealthConfig(**{"smoothing": SMOOTHING, **changes}), adversarial)


def spoken(watched: Alarms, lines: Iterable[Mapping[str, Any]]) -> dict[int, list[str]]:
    """Warnings by the number of the line, counted from 0, where there are any."""
    return {index: found for index, line in enumerate(lines) if (found := watched.see(line))}


def losses(*values: float | None) -> list[dict[str, Any]]:
    return [{"reconstruction_loss": value} for value in values]


def usages(*values: float, depth: int = 1) -> list[dict[str, Any]]:
    return [{"reconstruction_loss": 1.0, f"usage_{depth}": value} for value in values]


def logits(*pairs: tuple[float | None, float | None]) -> list[dict[str, Any]]:
    return [{"reconstruction_loss": 1.0, "logits_real": real, "logits_fake": fake} for real, fake in pairs]


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
            "usage_1": 0.9,
            "usage_2": min(0.8, 0.1 * step),
            "logits_real": 0.5,
            "logits_fake": -0.5,
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
    lines = [{"reconstruction_loss": 1.0, "usage_1": 0.9, "usage_2": second} for second in (0.4, 0.3, 0.1)]
    found = spoken(watched, lines)
    assert list(found) == [2] and "at depth 2, 40% were at best" in found[2][0]


@pytest.mark.parametrize(("floor", "told"), [(0.0, []), (0.3, [2]), (0.9, [1])])
def test_the_floor_of_usage_is_configured(floor, told):
    assert list(spoken(alarms(usage_floor=floor), usages(1.0, 0.6, 0.1, 0.0))) == told


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


@pytest.mark.parametrize("undefined", [None, float("nan"), float("inf")])
def test_an_undefined_reconstruction_is_told_at_once(undefined):
    found = spoken(alarms(), losses(1.0, undefined, undefined))
    assert list(found) == [1] and found[1][0].startswith("reconstruction_loss is not a number")


@pytest.mark.parametrize(
    ("adversarial", "real", "fake", "told"),
    [
        ("hinge", 1.3, -1.2, True),
        ("hinge", 5.0, -0.5, False),
        ("hinge", 1.3, 1.2, False),
        ("vanilla", 1.3, -1.2, False),
        ("vanilla", 4.5, -6.0, True),
    ],
)
def test_a_discriminator_that_is_sure_of_both_is_told(adversarial, real, fake, told):
    found = spoken(alarms(adversarial), logits(*[(0.1, 0.0)] * 10, *[(real, fake)] * 60))
    assert len(found) == told
    assert all("it is too sure to learn or to teach" in each[0] for each in found.values())


def test_the_bound_of_logits_is_configured():
    assert spoken(alarms(logits=2.0), logits(*[(1.9, -1.9)] * 20)) == {}
    assert len(spoken(alarms(logits=1.5), logits(*[(1.9, -1.9)] * 20))) == 1


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
