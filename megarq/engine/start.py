"""From a parsed command line to a session: every check that needs no process group comes before there is one."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megarq.config.deepspeed import read_ds_config, resolve_ds_config
from megarq.config.layout import check_layout
from megarq.config.names import CONFIGS, resolve_name
from megarq.config.run import RQTransformerRunConfig, RQVAERunConfig
from megarq.config.schema import flat
from megarq.engine.events import add_event
from megarq.engine.kernels import choose_kernels
from megarq.engine.preflight import Preflight
from megarq.engine.session import Session
from megarq.errors import ConfigError
from megarq.launch.environment import read_environment
from megarq.launch.process_group import joined, rank_device
from megarq.launch.watchdog import Watchdog
from megarq.parallel.topology import Topology


@contextmanager
def joined_session(
    config: RQTransformerRunConfig | RQVAERunConfig,
    ds_config: str,
    run: str,
    check: Callable[[Mapping[str, Any]], None] = lambda ds: None,
) -> Iterator[Session]:
    """This process's session, while the body runs.

    Args:
        config: the run's configuration.
        ds_config: DeepSpeed's JSON, or a name in configs/deepspeed.
        run: the run's folder.
        check: what else must hold of DeepSpeed's complete configuration.

    Raises:
        ConfigError: the configurations contradict each other or the ranks that were started.
    """
    environment = read_environment(os.environ)
    stated = read_ds_config(resolve_name(ds_config, CONFIGS / "deepspeed", ".json"))
    ds, topology = resolve_and_place(config, stated, environment.world_size, environment.rank)
    device, refusal, preflight = rank_device(environment), None, None
    try:
        check(ds)
        choose_kernels(config.train.kernels, device, ds)
    except ConfigError as error:  # perhaps on this rank alone, which lacks a file or a package
        if environment.world_size == 1 or not config.preflight.enabled:
            raise
        refusal = error
    if config.preflight.enabled:
        facts = flat({"ds_config": ds, "--output": str(Path(run).absolute()), **asdict(config)})
        preflight = Preflight(config.preflight, environment.rank, device, Path(run), facts, config.faults, refusal)

    def hung(step: int, verdict: str) -> None:
        add_event(Path(run), "failed", step, text=verdict, fault=True)

    watchdog = Watchdog(Path(run), topology.rank, topology.world_size, config.faults.hang_seconds, hung)
    with joined(environment, device, preflight.meet if preflight else lambda gather: None), watchdog:
        yield Session.open(config, ds, topology, Path(run), device, environment.launcher, preflight, watchdog)


def resolve_and_place(
    config: RQTransformerRunConfig | RQVAERunConfig, ds: Mapping[str, Any], world_size: int, rank: int
) -> tuple[dict[str, Any], Topology]:
    """Check everything that needs no process group: layout, batch sizes, ds_config. Raises ConfigError."""
    if isinstance(config, RQTransformerRunConfig):
        check_layout(config.model, config.parallel, config.train, ds, world_size)
    topology = Topology(world_size, rank, config.parallel.tp, config.parallel.pp)
    return resolve_ds_config(ds, config.train, config.parallel, topology.dp), topology
