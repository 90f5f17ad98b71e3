import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from random_inception import write_inception
from scored_pictures import stand_in, write_pictures

COUNT = 6
SMALL = ("--isc-splits", "3", "--kid-subset-size", "5", "--kid-subsets", "5")
"""For torch-fidelity's command line: as much as six pictures allow."""


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is made once."""
    return tmp_path_factory.mktemp("scoring")


@pytest.fixture(scope="session")
def inception_file(files: Path) -> Path:
    """Random weights of Inception whose features are of order one."""
    return write_inception(files)


@pytest.fixture(scope="session")
def generated(files: Path) -> Path:
    """Six pictures."""
    return write_pictures(files / "generated", COUNT, 0)


@pytest.fixture(scope="session")
def real(files: Path) -> Path:
    """Six smoother ones."""
    return write_pictures(files / "real", COUNT, 1, blur=2.0)


class Theirs(NamedTuple):
    """What torch-fidelity's command line left."""

    scores: dict[str, float]
    cache: Path


@pytest.fixture(scope="session")
def theirs(files: Path, generated: Path, real: Path, inception_file: Path) -> Theirs:
    """torch-fidelity's own command line on the two folders, the second cached under the name `real`."""
    command = [sys.executable, "-m", "torch_fidelity.fidelity", "--input1", str(generated), "--input2", str(real)]
    command += ["--cpu", "--json", "--silent", "--fid", "--isc", "--kid", "--prc", "--save-cpu-ram", *SMALL]
    command += ["--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", str(inception_file)]
    command += ["--input2-cache-name", "real", "--cache-root", str(files / "cache")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
    return Theirs(json.loads(done.stdout), files / "cache")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the networks be stand-ins, of six features and a made-up hash."""

    def use(dim: int = 6, sha256: str = "0" * 64) -> None:
        from megarq.scoring import evaluate

        monkeypatch.setattr(evaluate, "find_weights", lambda name, given: None)
        monkeypatch.setattr(
            evaluate,
            "build_network",
            lambda name, protocol, layers, weights, device: stand_in(name, tuple(layers), dim, sha256),
        )

    use()
    return use
