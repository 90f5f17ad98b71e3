"""What a step's numbers mean: go on, skip, go back."""

import math

import pytest

from megarq.config.faults import FaultConfig
from megarq.engine.guard import _WINDOW, Guard, not_finite

BAD = "loss is nan"


def test_steps_that_are_not_finite_are_skipped_until_there_are_too_many():
    guard = Guard(FaultConfig(skipped_steps=2), skippable=True)
    assert [guard.look(BAD, math.nan, False) for _ in range(3)] == [(BAD, False), (BAD, False), (BAD, True)]


def test_a_good_step_between_them_begins_the_count_anew():
    guard = Guard(FaultConfig(skipped_steps=1), skippable=True)
    assert guard.look(BAD, math.nan, False) == (BAD, False)
    assert guard.look(None, 1.0, True) == (None, False)
    assert guard.look(BAD, math.nan, False) == (BAD, False)


@pytest.mark.parametrize(("skippable", "applied"), [(False, False), (True, True)])
def test_a_step_that_has_changed_something_is_not_skipped(skippable, applied):
    assert Guard(FaultConfig(), skippable).look(BAD, math.nan, applied) == (BAD, True)


def spiking(**changes):
    return Guard(FaultConfig(spike_factor=2.0, spike_steps=3, **changes), skippable=True)


def fed(guard, losses):
    return [guard.look(None, loss, True)[1] for loss in losses]


def test_a_loss_that_stays_above_its_median_goes_back():
    guard = spiking()
    assert not any(fed(guard, [1.0] * _WINDOW))
    assert fed(guard, [2.5, 2.5, 1.0, 2.5, 2.5, 2.5]) == [False] * 5 + [True]


def test_spikes_do_not_move_the_median():
    guard = spiking()
    fed(guard, [1.0] * _WINDOW)
    for _ in range(_WINDOW):
        assert fed(guard, [2.5, 2.5, 1.0]) == [False] * 3
    assert fed(guard, [2.5] * 3)[-1]


def test_no_loss_is_a_spike_before_a_usual_one_is_known():
    assert not any(fed(spiking(), [1.0] * (_WINDOW - 6) + [9.0] * 5))


def test_without_a_factor_no_loss_is_a_spike():
    assert not any(fed(Guard(FaultConfig(), skippable=True), [1.0] * _WINDOW + [1e9] * 50))


def test_after_going_back_everything_begins_anew():
    guard = spiking()
    fed(guard, [1.0] * _WINDOW + [2.5, 2.5])
    guard.forget()
    assert not any(fed(guard, [2.5] * 5))


def test_all_numbers_that_are_not_finite_are_named():
    assert not_finite({"loss": math.inf, "image_loss": 1.0, "grad_norm": -1.0}) == "loss is inf, grad_norm is inf"
    assert not_finite({"loss": 1.0, "grad_norm": 0.0}) is None
