import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the exhaustive matrices too")
    parser.addoption("--tables", help="add what tests measure to tables in this folder, as JSON lines")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        skip = pytest.mark.skip(reason="exhaustive: run with --full")
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(skip)


@pytest.fixture
def make_lmdb(tmp_path: Path) -> Callable[[str, Mapping[bytes, bytes]], Path]:
    """Write a database of these keys and values into a folder of the test's, as LSUN's."""
    lmdb = pytest.importorskip("lmdb")

    def make(name: str, entries: Mapping[bytes, bytes]) -> Path:
        with (
            lmdb.open(str(tmp_path / name), map_size=2**26) as environment,
            environment.begin(write=True) as transaction,
        ):
            for key, value in entries.items():
                transaction.put(key, value)
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Callable[[str, dict[str, Any]], None]:
    """Takes the name of a table and a line of what was measured, and adds it where --tables says."""
    folder = request.config.getoption("--tables")

    def record(table: str, line: dict[str, Any]) -> None:
        if folder:
            with (Path(folder) / f"{table}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    return record
