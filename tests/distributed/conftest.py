from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gloo_ranks import RankGroup

GROUPS_KEPT = 2


@pytest.fixture(scope="module")
def rank_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RankGroup]]:
    """`rank_group(2)`: the module's group of two ranks; another for each layout, such as `rank_group(4, "tp2")`.

    DeepSpeed keeps the last `mpu` of a process for all its engines: layouts must not share processes. The groups
    used last are kept, the others ended: idle ranks with engines behind them cost time too.
    """
    groups: dict[tuple[int, str], RankGroup] = {}

    def group(size: int, layout: str = "dp") -> RankGroup:
        found = groups.pop((size, layout), None)
        groups[size, layout] = found or RankGroup(size, tmp_path_factory.mktemp(f"ranks-{size}-{layout}"))
        for older in list(groups)[:-GROUPS_KEPT]:
            groups.pop(older).close()
        return groups[size, layout]

    yield group
    for started in groups.values():
        started.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Folder of a run that is not there yet."""
    return tmp_path / "run"
