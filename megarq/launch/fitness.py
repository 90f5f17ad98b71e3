"""Are these ranks, and the machines that they are on, fit to start together?

Every check is called by all ranks with what this rank knows of itself, and answers, or raises, alike on all of them.
They need no process group: what is wrong here makes collectives hang, or NCCL fail with words of its own.
"""

import hashlib
import json
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

import torch

from megarq.errors import FaultError, MegarqError, PreflightError
from megarq.launch.gather import Gather
from megarq.launch.machine import installed_versions

_SHOWN = 4
"""Ranks that a message names, and keys."""
_FREE_SHARE = 0.9
"""Of a GPU's memory, that nobody else should hold."""
_CLOCK_ROUNDS = 3


@dataclass(frozen=True)
class DeviceReport:
    """The device that a rank will train on."""

    type: str
    """"cuda" or "cpu"."""
    name: str
    uuid: str
    """Of a GPU; empty for a CPU."""
    free_gib: float
    total_gib: float
    visible: int
    """GPUs that the rank sees."""
    failure: str = ""
    """Why the GPU does not answer."""

    @classmethod
    def of(cls, device: torch.device) -> "DeviceReport":
        """Look at a device."""
        if device.type != "cuda":
            return cls(device.type, platform.machine(), "", 0.0, 0.0, 0)
        try:
            properties = torch.cuda.get_device_properties(device)
            free, total = torch.cuda.mem_get_info(device)
        except RuntimeError as error:
            return cls("cuda", "", "", 0.0, 0.0, 0, str(error).splitlines()[0])
        uuid = str(properties.uuid)
        return cls("cuda", properties.name, uuid, free / 2**30, total / 2**30, torch.cuda.device_count())


@dataclass(frozen=True)
class Clocks:
    """How far apart the ranks' clocks are."""

    spread: float
    """Seconds between the first and the last."""
    furthest: int
    """The rank that is furthest from the median."""
    offset: float
    """Its clock, less the median."""


def code_facts() -> dict[str, Any]:
    """What must be the same on all ranks for them to compute alike: our sources, and the versions beneath them."""
    package = Path(__file__).parents[1]
    sha256 = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        sha256.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return {"sources of megarq": sha256.hexdigest()[:16], "python": platform.python_version(), **installed_versions()}


def named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Some of all ranks, by number and host."""
    shown = ", ".join(f"rank {rank} ({hosts[rank]})" for rank in ranks[:_SHOWN])
    return shown + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")


def differing(facts: Mapping[str, Any], hosts: Sequence[str], gather: Gather) -> str | None:
    """Which ranks have other facts than most, and which facts; None where all have the same.

    Of two halves, rank 0's is taken for the right one.
    """
    facts = json.loads(json.dumps(facts, default=str))
    digests = gather(hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest())
    usual = Counter(digests).most_common(1)[0][0]
    others = [rank for rank, digest in enumerate(digests) if digest != usual]
    if not others:
        return None
    everywhere = gather(facts)
    ours, theirs = everywhere[digests.index(usual)], everywhere[others[0]]
    keys = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    told = ", ".join(f"{key} is {theirs.get(key)} there and {ours.get(key)} elsewhere" for key in keys[:_SHOWN])
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{named(others, hosts)}: {told}{more}"


def check_refusals(own: MegarqError | None, hosts: Sequence[str], gather: Gather) -> None:
    """Raise what every rank refuses to start for; a FaultError where only some do."""
    refusals = gather(None if own is None else str(own))
    refusing = [rank for rank, text in enumerate(refusals) if text is not None]
    if own is not None and len(refusing) == len(hosts):
        raise own
    if refusing:
        raise FaultError(
            f"on {named(refusing, hosts)} alone: {refusals[refusing[0]]} Start on other nodes, or mend this one."
        )


def check_devices(own: DeviceReport, hosts: Sequence[str], gather: Gather) -> list[str]:
    """Warnings about devices that are unlike the others, or not free.

    Raises FaultError where a rank's device is missing, or is another's too; PreflightError where that is so on every
    host: then more ranks were started on each than it has devices.
    """
    devices = [DeviceReport(**report) for report in gather(asdict(own))]
    usual = Counter(device.type for device in devices).most_common(1)[0][0]
    if others := [rank for rank, device in enumerate(devices) if device.type != usual]:
        raise FaultError(
            f"{'no GPU' if usual == 'cuda' else 'a GPU'} on {named(others, hosts)}, unlike the other ranks. Start on "
            "other nodes, and have this one's driver looked at."
        )
    if others := [rank for rank, device in enumerate(devices) if device.failure]:
        raise FaultError(
            f"a GPU that does not answer on {named(others, hosts)} ({devices[others[0]].failure}). Start on other "
            "nodes, and have this one looked at."
        )
    _check_shared(devices, hosts)
    warnings = []
    name = Counter(device.name for device in devices).most_common(1)[0][0]
    if others := [rank for rank, device in enumerate(devices) if device.name != name]:
        warnings.append(
            f"a {devices[others[0]].name} on {named(others, hosts)}, on most ranks a {name}: all wait for the slowest"
        )
    if others := [rank for rank, device in enumerate(devices) if device.free_gib < _FREE_SHARE * device.total_gib]:
        device = devices[others[0]]
        warnings.append(
            f"only {device.free_gib:.1f} of {device.total_gib:.1f} GiB free on the GPU of {named(others, hosts)}: "
            "another process holds the rest"
        )
    return warnings


def _check_shared(devices: Sequence[DeviceReport], hosts: Sequence[str]) -> None:
    users: dict[str, list[int]] = defaultdict(list)
    for rank, device in enumerate(devices):
        if device.uuid:
            users[device.uuid].append(rank)
    shared = [ranks for ranks in users.values() if len(ranks) > 1]
    if not shared:
        return
    crowded = {hosts[rank] for ranks in shared for rank in ranks}
    first = shared[0][0]
    text = (
        f"one GPU for {named(shared[0], hosts)}: {hosts.count(hosts[first])} ranks were started on {hosts[first]}, "
        f"which shows them {devices[first].visible} GPUs."
    )
    if crowded == set(hosts):
        raise PreflightError(f"{text} Start as many ranks on each host as it has GPUs.")
    raise FaultError(f"{text} Start on other nodes, and have this one looked at: the other hosts have enough.")


def read_clocks(gather: Gather) -> Clocks:
    """The ranks' wall clocks at one moment: the best of some meetings, since ranks do not wake at once."""
    rounds = []
    for _ in range(_CLOCK_ROUNDS):
        gather(None)
        rounds.append(gather(time.time()))
    times = min(rounds, key=lambda times: max(times) - min(times))
    middle = median_low(times)
    furthest = max(range(len(times)), key=lambda rank: abs(times[rank] - middle))
    return Clocks(max(times) - min(times), furthest, times[furthest] - middle)
