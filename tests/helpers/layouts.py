"""The layouts that the tests train in, by name: ranks, how the model is cut over them, and the ZeRO stage."""

from typing import Any, NamedTuple

from gloo_ranks import RankGroup
from tiny_runs import ds_config

from megarq.config.run import ParallelConfig


class TestedLayout(NamedTuple):
    """What `engine_run` is told of a layout."""

    ranks: int
    parallel: ParallelConfig
    stage: int

    @property
    def data_ranks(self) -> int:
        """Data-parallel size."""
        return self.ranks // (self.parallel.tp * self.parallel.pp)

    @property
    def ds(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        return ds_config(self.stage)

    def on(self, rank_group: Any) -> RankGroup:
        """Its ranks; layouts that cut the model differently have processes of their own."""
        return rank_group(self.ranks, f"tp{self.parallel.tp} pp{self.parallel.pp}")


def _layout(dp: int = 1, stage: int = 1, **parallel: Any) -> TestedLayout:
    cut = ParallelConfig(**parallel)
    return TestedLayout(dp * cut.tp * cut.pp, cut, stage)


LAYOUTS = {
    **{f"dp{dp} ZeRO-{stage}": _layout(dp, stage) for dp in (1, 2, 4) for stage in (1, 2, 3)},
    **{f"tp{tp} ZeRO-{stage}": _layout(1, stage, tp=tp) for tp in (2, 4) for stage in (1, 2, 3)},
    **{f"tp2 dp2 ZeRO-{stage}": _layout(2, stage, tp=2) for stage in (1, 2, 3)},
    **{f"pp{pp} ZeRO-1": _layout(1, 1, pp=pp) for pp in (2, 4)},
    "tp2 pp2 ZeRO-1": _layout(1, 1, tp=2, pp=2),
    "pp2 dp2 ZeRO-1": _layout(2, 1, pp=2),
    "tp2 sequence ZeRO-1": _layout(1, 1, tp=2, sequence=True),
    "tp4 sequence ZeRO-3": _layout(1, 3, tp=4, sequence=True),
    "tp2 sequence pp2 ZeRO-1": _layout(1, 1, tp=2, pp=2, sequence=True),
}
