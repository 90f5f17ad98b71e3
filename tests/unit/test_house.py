"""What no single file can see: names, sizes, and rooms that work without DeepSpeed and MPI."""

import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megarq"
CHILDREN = sorted(
    path.stem
    for path in PACKAGE.iterdir()
    if not path.name.startswith((".", "__")) and (path.suffix == ".py" or path.is_dir())
)
LINES = 500
WITHOUT_ENGINE = ["megarq", "megarq.inference", "megarq.checkpoint", "megarq.data"]
IMPORT_ALL = """
import importlib, pkgutil, sys
for name in ("deepspeed", "mpi4py"):
    sys.modules[name] = None  # importing it raises
room = importlib.import_module(sys.argv[1])
for module in pkgutil.iter_modules(room.__path__) if sys.argv[1] != "megarq" else ():
    importlib.import_module(f"{sys.argv[1]}.{module.name}")
"""


def test_the_package_has_children():
    assert {"train", "train_rqvae", "engine", "transformer"} <= set(CHILDREN)


@pytest.mark.parametrize("name", CHILDREN)
def test_no_child_hides_another_module(name):
    """`deepspeed megarq/train.py` puts megarq/ first on sys.path: `import NAME` anywhere would find our file."""
    installed = set(packages_distributions()) - {"megarq"}
    assert name not in sys.stdlib_module_names
    assert name not in installed


@pytest.mark.parametrize(
    "path",
    sorted(path for folder in ("megarq", "tools", "evaluation", "tests") for path in (ROOT / folder).rglob("*.py")),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_file_is_longer_than_a_reader_bears(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES


@pytest.mark.parametrize("room", WITHOUT_ENGINE)
def test_rooms_work_without_deepspeed_and_mpi(room):
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, room], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
