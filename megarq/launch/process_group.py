"""Joining the job: the device of this rank and torch.distributed's default process group."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megarq.errors import FaultError, Stopped
from megarq.launch.environment import LaunchEnvironment
from megarq.launch.gather import Gather, over_store

TIMEOUT = timedelta(hours=2)
"""Of a collective: more than the watchdog's patience in its slowest part, since it alone says who hangs."""
MEETING = timedelta(minutes=30)
"""For all ranks to join."""


def rank_device(environment: LaunchEnvironment) -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", environment.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextmanager
def joined(
    environment: LaunchEnvironment, device: torch.device, meet: Callable[[Gather], object] = lambda gather: None
) -> Iterator[None]:
    """The default process group while the body runs: NCCL on GPUs, gloo otherwise; a group of one when started alone.

    All ranks call `meet` when they have found each other, before the group is made.

    The launcher's variables are completed for libraries that read them, and the group is destroyed at the end:
    processes that exit with a live group now and then abort after success. Not so where the body fails on a GPU: NCCL
    would wait there for peers that wait in a collective, and the launcher, which ends them, for this process.
    """
    # DeepSpeed takes cuda:$LOCAL_RANK: another device than ours where a launcher shows each rank one GPU alone.
    local_rank = device.index if device.type == "cuda" else environment.local_rank
    place = {"RANK": environment.rank, "WORLD_SIZE": environment.world_size, "LOCAL_RANK": local_rank}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.setdefault("MASTER_ADDR", environment.address)
    os.environ.setdefault("MASTER_PORT", str(environment.port))
    store = _store(environment)
    meet(over_store(store, environment.rank, environment.world_size))
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=TIMEOUT,
    )
    failed = True
    try:
        yield
        failed = False
    except Stopped:
        failed = False
        raise
    finally:
        if not (failed and device.type == "cuda"):
            dist.destroy_process_group()


def _store(environment: LaunchEnvironment) -> dist.Store:
    if environment.world_size == 1:
        return dist.HashStore()
    torchelastic = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    master = environment.rank == 0 and not torchelastic
    attempt = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"  # torchrun's store outlives its restarts
    try:
        store = dist.TCPStore(environment.address, environment.port, environment.world_size, master, timeout=MEETING)
    except dist.DistNetworkError as error:
        raise FaultError(
            f"rank {environment.rank} cannot meet the others at {environment.address}:{environment.port} "
            f"({str(error).splitlines()[0]}). Choose a free port: deepspeed --master_port PORT, or export MASTER_PORT."
        ) from error
    return dist.PrefixStore(attempt, store)
