from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_checkpoints import save_alone
from torch import Tensor

from megarq.checkpoint.format import Fragment

WEIGHT = torch.arange(24.0).reshape(6, 4)
BIAS = torch.arange(5.0)


def whole_tensors() -> dict[str, tuple[Fragment, Tensor]]:
    """A weight [6, 4] and a bias [5], each whole."""
    return {"param/weight": (Fragment((6, 4)), WEIGHT), "param/bias": (Fragment((5,)), BIAS)}


def publish(
    run: Path,
    step: int,
    tensors: Mapping[str, tuple[Fragment, Tensor]] | None = None,
    keep: int = 0,
    **metadata: Any,
) -> Path:
    """Save a step from one rank; returns its folder."""
    return save_alone(run, step, whole_tensors() if tensors is None else tensors, metadata, keep)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that holds the checkpoint of step 3."""
    publish(tmp_path / "run", 3)
    return tmp_path / "run"


@pytest.fixture
def step(run: Path) -> Path:
    """The folder of that checkpoint."""
    return run / "checkpoints" / "step-00000003"


@pytest.fixture(name="publish")
def publish_fixture():
    return publish
