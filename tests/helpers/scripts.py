"""The commands as modules, for tests that call them in their own process."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def load_script(script: str) -> ModuleType:
    """A script by its path in the repository, such as tools/export.py."""
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py").replace("/", "_"), ROOT / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
