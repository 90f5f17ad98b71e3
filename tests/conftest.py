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
