"""What a run tells of its codebook's health, and when."""

import pytest
import torch

from megarq.config.models import RQVAEConfig
from megarq.config.run import HealthConfig, RQVAERunConfig
from megarq.engine.health import Health

CPU = torch.device("cpu")
EVERY = 3


def health(shared: bool = True, history=()) -> Health:
    """Of codebooks of 4 codes, looked at every third step."""
    model = RQVAEConfig(codebook_size=4, depth=2, shared_codebook=shared)
    return Health(RQVAERunConfig(model=model, health=HealthConfig(every=EVERY, smoothing=2)), CPU, None, history)


def codes(first: int, second: int) -> torch.Tensor:
    """One stack, [1, 1, 1, 2]."""
    return torch.tensor([first, second]).view(1, 1, 1, 2)


def observe(watched: Health, step: int, stack: tuple[int, int], loss: float = 1.0):
    watched.add(codes(*stack))
    return watched.observe(step, {"reconstruction_loss": loss})


def test_use_is_told_at_the_end_of_each_window():
    watched = health()
    found = [observe(watched, step, stack) for step, stack in enumerate([(0, 1), (0, 2), (3, 2)] * 2, 1)]
    assert [bool(each.values) for each in found] == [False, False, True] * 2
    assert found[2].values == found[5].values
    values = found[2].values
    assert (values["usage_1"], values["dead_1"]) == (0.5, 2)
    assert values["perplexity_1"] == values["perplexity_2"] == pytest.approx(1.89, abs=0.01)
    assert (values["usage"], values["dead"]) == (1.0, 0)


def test_a_window_has_a_console_line_and_a_chart():
    watched = health()
    found = [observe(watched, step, (0, step - 1)) for step in (1, 2, 3)][-1]
    assert found.lines == ["codes over 3 steps, by depth: used 25% 75% | perplexity 1 3 | dead 3 1"]
    assert found.charts["code_frequencies"].shape == (3, 3 * 96, 512)


def test_codebooks_of_their_own_have_no_total():
    watched = health(shared=False)
    found = [observe(watched, step, (0, 1)) for step in (1, 2, 3)][-1]
    assert "usage_2" in found.values and "usage" not in found.values


def test_a_window_that_a_restart_cut_short_is_not_told():
    watched = health()
    found = {step: observe(watched, step, (0, 1)) for step in range(2, 7)}
    assert [step for step, each in found.items() if each.values] == [6]


def test_a_warning_is_a_line_and_a_value():
    watched = health()
    for step in range(1, 10):
        found = observe(watched, step, (0, 1), 1.0 if step < 6 else 50.0)
        if found.values.get("warning"):
            break
    assert found.values["warning"].startswith("reconstruction_loss is") and "\n" not in found.values["warning"]
    assert found.warnings == [found.values["warning"]]


def test_the_history_is_judged_with_and_not_told_again():
    told = {"reconstruction_loss": 1.0, "usage": 0.1, "perplexity": 2.0}
    watched = health(history=[{**told, "usage": 1.0}, told])
    found = [observe(watched, step, (0, step % 2)) for step in (1, 2, 3)][-1]
    assert "warning" not in found.values
    fresh = health(history=[{**told, "usage": 1.0}])
    found = [observe(fresh, step, (0, 0)) for step in (1, 2, 3)][-1]
    assert "25% of the codes are used, 100% were at best" in found.values["warning"]
