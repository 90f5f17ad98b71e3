"""Learning rates against their formulas, and the length of a run."""

from math import cos, pi

import pytest

from megarq.config.run import TrainConfig
from megarq.engine.schedule import learning_rate, run_length
from megarq.errors import ConfigError

COSINE = TrainConfig(lr=2.0, schedule="cosine")
CONSTANT = TrainConfig(lr=2.0, schedule="constant")


def rates(config: TrainConfig, total: int, warmup: int) -> list[float]:
    return [learning_rate(step, total, warmup, config) for step in range(total)]


def test_cosine_without_warmup_starts_at_the_peak():
    assert rates(COSINE, 4, 0) == pytest.approx([2.0, 1 + cos(pi / 4), 1.0, 1 + cos(3 * pi / 4)])


def test_cosine_would_be_zero_after_the_last_step():
    assert learning_rate(10, 10, 0, COSINE) == pytest.approx(0.0)


def test_warmup_rises_linearly_to_the_peak():
    assert rates(COSINE, 8, 4)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_the_first_step_of_a_warmup_is_not_lost():
    assert learning_rate(0, 100, 50, COSINE) > 0


def test_cosine_falls_after_warmup():
    falling = rates(COSINE, 20, 5)[5:]
    assert falling == sorted(falling, reverse=True) and falling[-1] < 0.1


def test_constant_stays_at_the_peak_after_warmup():
    assert rates(CONSTANT, 5, 2) == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0])


@pytest.mark.parametrize("config", [COSINE, CONSTANT])
def test_what_joins_later_has_a_warmup_of_its_own_under_the_runs_schedule(config):
    run = rates(config, 20, 4)
    late = [learning_rate(step, 20, 4, config, joined=10) for step in range(10, 20)]
    expected = [share * rate for share, rate in zip([0.25, 0.5, 0.75] + [1.0] * 7, run[10:], strict=True)]
    assert late == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [3, 5])
def test_a_warmup_as_long_as_the_run_is_only_warmup(warmup):
    assert rates(COSINE, 3, warmup) == pytest.approx([2.0 * (step + 1) / warmup for step in range(3)])


def test_steps_override_epochs():
    assert run_length(TrainConfig(steps=7, epochs=100.0, global_batch_size=10), 1000) == (7, 0)


def test_epochs_count_global_batches():
    assert run_length(TrainConfig(epochs=2.5, global_batch_size=10), 1000) == (250, 0)


def test_a_run_has_at_least_one_step():
    assert run_length(TrainConfig(epochs=0.01, global_batch_size=64), 100)[0] == 1


def test_warmup_steps_and_epochs_add_up():
    config = TrainConfig(steps=1000, global_batch_size=10, warmup_steps=5, warmup_epochs=0.5)
    assert run_length(config, 1000) == (1000, 55)


def test_a_batch_of_more_than_there_is_is_refused():
    assert run_length(TrainConfig(steps=7, global_batch_size=50), 50)[0] == 7
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=64: --data holds 50 samples.*Use 50 or less"):
        run_length(TrainConfig(steps=7, global_batch_size=64), 50)
