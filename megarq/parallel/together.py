"""Doing a thing on all ranks such that nobody waits for a rank that failed."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megarq.errors import FaultError, MegarqError, is_fault
from megarq.launch.gather import Gather

T = TypeVar("T")


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in order of rank (collective)."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def alike(action: Callable[[], T]) -> T:
    """This rank's result of an action that all ranks do; where it fails on any rank, raise on all (collective)."""
    kept: list[T] = []
    together(lambda: kept.append(action()))
    return kept[0]


def from_rank_zero(action: Callable[[], T]) -> T:
    """What rank 0 alone found out; where it failed, raise on all ranks (collective)."""
    found = [alike(lambda: action() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(found, src=0)
    assert found[0] is not None
    return found[0]


def together(action: Callable[[], T], gather: Gather = gather_objects) -> list[T]:
    """Run `action` on every rank and return all results; where it fails on any rank, raise on all (collective).

    The rank that failed raises its own MegarqError or OSError, the others a MegarqError that quotes it, which is a
    FaultError where a restart may help.
    """
    result: T | None = None
    failure: MegarqError | OSError | None = None
    try:
        result = action()
    except (MegarqError, OSError) as error:
        failure = error
    fault = failure is not None and is_fault(failure)
    outcomes = gather((result, None if failure is None else str(failure), fault))
    if failure is not None:
        raise failure
    for rank, (_, message, fault) in enumerate(outcomes):
        if message is not None:
            kind = FaultError if fault else MegarqError
            raise kind(f"rank {rank} failed, so this one stops too: {message}")
    return [result for result, _, _ in outcomes]
