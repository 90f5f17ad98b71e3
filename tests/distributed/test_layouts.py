"""One loss curve on every layout: losses and gradient norms are those of plain torch in one process.

The matrix is layouts x dropout x condition x targets x accumulation x precision. `make test` runs every layout once,
and among these cases every pair of values of two other factors; `make test-full` runs the whole product.
"""

from collections.abc import Callable, Iterator
from itertools import cycle, product
from typing import Any, NamedTuple

import pytest
from allpairspy import AllPairs
from layouts import LAYOUTS
from tiny_runs import Metrics, engine_run, largest_deviation, metrics_of, plain_run, tiny_config

STEPS, LEARNING_RATE = 10, 2e-3
"""Adam moves a weight whose first gradient is rounding noise as far as any other, so deviations grow with the rate: the
largest of one case was 2.9e-6 at 1e-3, 6.0e-6 at 2e-3 and 1.3e-5 at 5e-3."""
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
FACTORS: dict[str, list[Any]] = {
    "layout": list(LAYOUTS),
    "dropout": [0.0, 0.1],
    "condition": ["text", "class"],
    "targets": ["hard", "soft"],
    "accumulation": [1, 2],
    "precision": ["fp32", "bf16"],
}


class Case(NamedTuple):
    """One cell of the matrix."""

    layout: str
    dropout: float
    condition: str
    targets: str
    accumulation: int
    precision: str

    def __str__(self) -> str:
        dropout = "dropout" if self.dropout else "no dropout"
        return f"{self.layout}, {dropout}, {self.condition}, {self.targets}, x{self.accumulation}, {self.precision}"


LAYOUT, *OTHERS = FACTORS.values()
CHOSEN = {Case(layout, *values) for layout, values in zip(LAYOUT, cycle(AllPairs(OTHERS)), strict=False)}
CASES = [
    pytest.param(case, id=str(case), marks=() if case in CHOSEN else pytest.mark.full)
    for case in (Case(*values) for values in product(*FACTORS.values()))
]


@pytest.fixture(scope="module")
def reference(rank_group) -> Iterator[Callable[..., Metrics]]:
    """`reference(data_ranks, **options of tiny_config)`: plain torch's metrics, computed once for all layouts."""
    known: dict[Any, Metrics] = {}

    def metrics(data_ranks: int, **options: Any) -> Metrics:
        key = (data_ranks, *sorted(options.items()))
        if key not in known:
            known[key] = rank_group(1, "plain").run(plain_run, tiny_config(**options), data_ranks)[0][0]
        return known[key]

    yield metrics


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradient_norms_are_plain_torchs(rank_group, reference, record, run, case):
    layout = LAYOUTS[case.layout]
    options = {
        "steps": STEPS,
        "lr": LEARNING_RATE,
        "dropout": case.dropout,
        "condition": case.condition,
        "soft": case.targets == "soft",
        "micro_batch_size": 8 // layout.data_ranks // case.accumulation,
        "precision": case.precision,
    }
    layout.on(rank_group).run(engine_run, run, tiny_config(**options), layout.ds, layout.parallel)
    expected = reference(layout.data_ranks, **options)
    deviation = largest_deviation(metrics_of(run), expected)
    record("layouts", case._asdict() | {"largest_relative_deviation": deviation})
    assert deviation < TOLERANCE[case.precision]


def test_clipping_bites_in_these_runs(reference):
    assert all(line["grad_norm"] > 0.5 for line in reference(1, steps=STEPS, lr=LEARNING_RATE))


def test_dropout_changes_these_runs(reference):
    options = {"steps": STEPS, "lr": LEARNING_RATE}
    assert largest_deviation(reference(1, dropout=0.1, **options), reference(1, **options)) > 1e-2
