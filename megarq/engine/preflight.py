"""What a run checks once, before its first step, on all ranks together; `launch` and `parallel` have the single checks.

    meet(gather)              before there is a process group: code, configuration, devices, clocks, the run's folder
    try_collectives(groups)   all_reduce right and fast, which rank is slow
    see(paths), read(files)   what the command line names, then what this rank will read
    make_room(bytes, ..)      for checkpoints
    tell(log, step)           the console line, warnings, and the run's event

Whatever fails is raised on all ranks alike: a PreflightError where a person must mend something, a FaultError where a
start on other nodes may be all that it takes. It is a `failed` event of a run that is there already.
"""

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median_low
from typing import Any, Protocol

import torch

from megarq.checkpoint.run_folder import kept_checkpoints, space_for_checkpoints
from megarq.config.faults import FaultConfig
from megarq.config.preflight import PreflightConfig
from megarq.config.run import CheckpointConfig
from megarq.engine.events import add_event, read_events
from megarq.engine.ranks import probe
from megarq.errors import FaultError, MegarqError, PreflightError
from megarq.launch.disks import check_folder, check_readable, check_same_files
from megarq.launch.fitness import (
    DeviceReport,
    check_devices,
    check_refusals,
    code_facts,
    differing,
    named,
    read_clocks,
)
from megarq.launch.gather import Gather
from megarq.parallel.measure import (
    all_reduce_seconds,
    bus_bandwidth,
    exchange_with_neighbours,
    sum_is_right,
    typical,
)
from megarq.parallel.topology import ProcessGroups

_ALL_REDUCE_MIB = {"cpu": 1.0, "cuda": 256.0}
_PROBES = 3
"""A rank is slow only if it is so as often in a row."""
_GIB = 2**30


class Log(Protocol):
    """Where the result goes: a MetricsLog."""

    def say(self, message: str) -> None: ...
    def warn(self, step: int, warning: str) -> None: ...
    def event(self, event: str, step: int, **values: Any) -> None: ...


class Preflight:
    """The checks of one start. Every rank makes the same calls, `meet` first."""

    def __init__(
        self,
        config: PreflightConfig,
        rank: int,
        device: torch.device,
        run: Path | None,
        configuration: Mapping[str, Any],
        faults: FaultConfig,
        refusal: MegarqError | None = None,
    ) -> None:
        """Nothing is checked yet.

        Args:
            config: what is demanded.
            rank: this rank.
            device: where it will train.
            run: the run's folder; None where there is no run.
            configuration: dotted keys and values that must be the same on all ranks.
            faults: when a rank is slow.
            refusal: what this rank, perhaps alone, found wrong with its machine before; raised when the ranks have met.
        """
        self._config, self._rank, self._device, self._run = config, rank, device, run
        self._configuration, self._refusal = configuration, refusal
        self._slow_factor = faults.slow_factor
        self.hosts: list[str] = []
        """Of all ranks, once they have met."""
        self._seconds = 0.0
        self._line: list[str] = []
        self.warnings: list[str] = []
        """Sentences without a full stop."""
        self.found: dict[str, Any] = {}
        """What was measured, for the run's events."""

    def meet(self, gather: Gather) -> None:
        """Compare the ranks before they have a process group, over `gather`, which is kept for later checks."""
        self._gather = gather
        hosts = self.hosts = gather(socket.gethostname())
        with self._checking():
            check_refusals(self._refusal, hosts, gather)
            code, ours = code_facts(), self._configuration
            if found := differing(code, hosts, gather):
                raise PreflightError(f"the ranks run different code; {found}. Make it the same on all nodes.")
            if found := differing(ours, hosts, gather):
                raise PreflightError(f"the ranks are configured differently; {found}. Give all ranks the same command.")
            device = DeviceReport.of(self._device)
            self.warnings += check_devices(device, hosts, gather)
            if self._run is not None:
                check_folder(self._run, self._rank, hosts, gather)
            self._note(ranks=len(hosts), hosts=len(set(hosts)), device=device.name, code=code["sources of megarq"])
            self._line.append(f"{_count(len(hosts), 'rank')} on {_count(len(set(hosts)), 'host')}")
            self._compare_clocks()

    def _compare_clocks(self) -> None:
        if len(self.hosts) == 1:
            return
        clocks = read_clocks(self._gather)
        self._note(clock_spread_seconds=round(clocks.spread, 4))
        self._line.append(f"clocks within {1e3 * clocks.spread:.2g} ms")
        if abs(clocks.offset) > self._config.max_clock_skew_seconds:
            self.warnings.append(
                f"the clock of {named([clocks.furthest], self.hosts)} is {abs(clocks.offset):.3g} s "
                f"{'ahead' if clocks.offset > 0 else 'behind'}, preflight.max_clock_skew_seconds is "
                f"{self._config.max_clock_skew_seconds:g}: times in its logs and files mislead; look at its NTP"
            )

    def try_collectives(self, groups: ProcessGroups, mark: Callable[[str], object] = lambda doing: None) -> None:
        """Sums over all groups, the bandwidth over all ranks, and each rank's own speed, each marked when it begins."""
        if len(self.hosts) == 1:
            return
        with self._checking():
            mark("preflight: all_reduce")
            self._check_sums(groups)
            mark("preflight: bandwidth")
            self._check_bandwidth()
            mark("preflight: each rank's own work")
            self._find_slow()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def _check_sums(self, groups: ProcessGroups) -> None:
        topology = groups.topology
        places = {
            "all ranks": (None, topology.rank, topology.world_size),
            "the data-parallel ranks": (groups.data, topology.data_rank, topology.dp),
            "the tensor-parallel ranks": (groups.tensor.group, topology.tensor_rank, topology.tp),
        }
        for whom, (group, place, size) in places.items():
            answers = self._gather(size == 1 or sum_is_right(group, place, size, self._device))
            if wrong := [rank for rank, right in enumerate(answers) if not right]:
                raise FaultError(
                    f"a wrong sum from all_reduce over {whom} on {named(wrong, self.hosts)}. Start on other nodes, and "
                    "have the network and memory of these looked at."
                )

    def _check_bandwidth(self) -> None:
        hosts, gather, least = self.hosts, self._gather, self._config.min_bandwidth_gbs
        mib = self._config.all_reduce_mib or _ALL_REDUCE_MIB[self._device.type]
        count = max(1, round(mib * 2**20 / 4))
        bandwidth = bus_bandwidth(count, len(hosts), typical(gather(all_reduce_seconds(None, count, self._device))))
        latency = typical(gather(all_reduce_seconds(None, 1, self._device)))
        exchanges = gather(exchange_with_neighbours(count, self._device))
        if wrong := [rank for rank, (_, right) in enumerate(exchanges) if not right]:
            raise FaultError(
                f"other numbers than the rank before sends on {named(wrong, hosts)}. Start on other nodes, and have "
                "the network between them looked at."
            )
        rates = [4 * count / seconds / 1e9 for seconds, _ in exchanges]
        slowest = min(range(len(rates)), key=rates.__getitem__)
        self._line.append(f"all_reduce {bandwidth:.3g} GB/s")
        self._note(
            all_reduce_mib=mib,
            all_reduce_gbs=round(bandwidth, 4),
            all_reduce_latency_ms=round(1e3 * latency, 4),
            neighbours_gbs=round(median_low(rates), 4),
            slowest_neighbour=slowest,
            slowest_neighbour_host=hosts[slowest],
            slowest_neighbour_gbs=round(rates[slowest], 4),
        )
        if least is not None and bandwidth < least:
            raise FaultError(
                f"all_reduce of {mib:g} MiB over {len(hosts)} ranks has a bus bandwidth of {bandwidth:.3g} GB/s, "
                f"preflight.min_bandwidth_gbs is {least:g}; slowest with the ranks beside it is "
                f"{named([slowest], hosts)}, at {rates[slowest]:.3g} GB/s, {median_low(rates):.3g} being the median. "
                "Start on other nodes, have the network of this one looked at, or ask for less."
            )

    def _find_slow(self) -> None:
        slow, times = set(range(len(self.hosts))), []
        for _ in range(_PROBES):
            times = self._gather(probe(self._device))
            slow &= {rank for rank, seconds in enumerate(times) if seconds > self._slow_factor * median_low(times)}
            if not slow:
                break
        self._note(slow_ranks=sorted(slow))
        if slow:
            worst = max(slow, key=times.__getitem__)
            self.warnings.append(
                f"products of matrices that take {median_low(times) * 1e3:.3g} ms on most ranks take "
                f"{times[worst] * 1e3:.3g} ms on {named(sorted(slow), self.hosts)}: all wait for it at each step"
            )

    def see(self, paths: Iterable[Path], contents: bool) -> None:
        """What the command line names must be there for all ranks, and the same by size or `contents`, or for none."""
        with self._checking():
            check_same_files(paths, contents, self.hosts, self._gather)

    def read(self, files: Mapping[Path, int]) -> None:
        """Open the files, of these sizes, that this rank will read."""
        with self._checking():
            check_readable(files, self.hosts, self._gather)
            self._note(files_read=sum(self._gather(len(files))))

    def make_room(self, size: int, config: CheckpointConfig, saves: int) -> None:
        """See whether checkpoints of `size` bytes fit beside what is in the run's folder; `saves` are still to come."""
        if self._run is None or saves == 0:
            return
        with self._checking():
            free, there = self._gather((space_for_checkpoints(self._run), kept_checkpoints(self._run)))[0]
            # The oldest goes when the newest is whole: for a moment there is one more than is kept.
            wanted = min(saves, max(1, config.keep + 1 - there)) if config.keep else saves
            fit = free // max(size, 1)
            self._note(checkpoint_bytes=size, checkpoints_that_fit=fit)
            self._line.append(f"space for {_count(fit, 'checkpoint')}")
            told = f"{self._run} has {free / _GIB:.3g} GiB free, a checkpoint takes {size / _GIB:.3g}"
            if fit == 0:
                raise PreflightError(
                    f"{told}, beside the {there} that are there. Free space, or choose another --output."
                )
            if fit < wanted:
                self.warnings.append(
                    f"{told}, and {wanted} more are to lie there at once (checkpoint.keep={config.keep}): the disk "
                    "will be full; free space, or keep fewer"
                )

    def tell(self, log: Log, step: int) -> None:
        """What was found: a line, the warnings, and an event."""
        log.say(self.line())
        log.event("preflight", step, seconds=round(self._seconds, 3), **self.found)
        for warning in self.warnings:
            log.warn(step, warning)

    def line(self) -> str:
        """The result, for the console."""
        return f"preflight: {', '.join(self._line)}, {self._seconds:.2g} s"

    def _note(self, **found: Any) -> None:
        self.found |= found

    @contextmanager
    def _checking(self) -> Iterator[None]:
        """Counts the seconds of the checks inside, and tells of one that fails."""
        start = time.monotonic()
        try:
            yield
        except (PreflightError, FaultError) as error:
            self._add_failure(f"preflight: {error}")
            raise
        finally:
            self._seconds += time.monotonic() - start

    def _add_failure(self, text: str) -> None:
        if self._rank == 0 and self._run is not None and os.access(self._run, os.W_OK):
            step = max((event["step"] for event in read_events(self._run)), default=0)
            add_event(self._run, "failed", step, text=text)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
