"""The notebook is stored without outputs, and runs from its first cell to its last."""

import base64
import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_models import build_models, export_models, write_tokenizer

from tests.end_to_end.commands import ON_CPU, ROOT

NOTEBOOK = ROOT / "notebooks" / "T2I_sampling.ipynb"
SECONDS = 120
CODE = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def execute(model: Path, output: Path) -> "subprocess.CompletedProcess[str]":
    """Run a copy of the notebook that has its outputs, by nbclient's command."""
    pytest.importorskip("nbclient")
    command = [Path(sys.executable).with_name("jupyter-execute"), NOTEBOOK, "--output", output]
    environment = {**os.environ, **ON_CPU, "MEGARQ_MODEL": str(model)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)


def pictures(cell: dict[str, Any]) -> list[Image.Image]:
    """Those that a cell shows."""
    shown = [output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})]
    return [Image.open(BytesIO(base64.b64decode(content))) for content in shown]


def test_no_outputs_are_stored() -> None:
    assert CODE
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)


def test_every_cell_runs_and_those_that_show_pictures_show_one(tmp_path: Path) -> None:
    model = export_models(build_models(), tmp_path / "model", tokenizer_file=write_tokenizer(tmp_path))
    done = execute(model, tmp_path / "done.ipynb")
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "done.ipynb").read_text(encoding="utf-8"))["cells"]
    ran = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(CODE) + 1))
    showing = [cell for cell in ran if any(line.startswith("show(") for line in cell["source"])]
    assert len(showing) >= 6
    for cell in showing:
        (picture,) = pictures(cell)
        assert picture.width == 8 * 80 and len(picture.convert("L").getcolors()) > 2


def test_a_cell_that_raises_is_noticed(tmp_path: Path) -> None:
    done = execute(tmp_path / "nowhere", tmp_path / "done.ipynb")
    assert done.returncode != 0 and "nowhere" in done.stderr
