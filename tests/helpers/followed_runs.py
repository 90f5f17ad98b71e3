"""Runs as seen from outside: how far they have come, what happened, and whether two are the same."""

import json
from pathlib import Path
from typing import Any

import torch

from megarq.checkpoint.run_folder import checkpoint_at
from megarq.engine.events import read_events


def last_step(run: Path) -> int:
    """Of those in the metrics; 0 before the first."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["event"] == kind]


def expect_same_run(ours: Path, expected: Path) -> None:
    """Each step once, the same losses, and all that is saved of the last step the same, to the last bit."""
    lines, wanted = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (ours, expected)
    )
    for name in ("step", "loss", "grad_norm", "lr", "samples_seen", "epoch"):
        assert [line[name] for line in lines] == [line[name] for line in wanted], name
    a, b = checkpoint_at(ours), checkpoint_at(expected)
    assert a.metadata["step"] == b.metadata["step"] == wanted[-1]["step"]
    for kind in ("param", "exp_avg", "exp_avg_sq", "ema"):
        assert a.names(kind) == b.names(kind) != []
        assert all(torch.equal(a.tensor(name, kind), b.tensor(name, kind)) for name in a.names(kind)), kind
