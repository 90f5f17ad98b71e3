"""Where a run stands, from the files in its folder alone: no torch, and nothing that the run would notice.

metrics.jsonl   its last lines: step, losses, pace, memory, who is slowest
events.jsonl    starts, checkpoints, skipped steps, warnings, how it ended
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megarq.engine.events import read_events
from megarq.engine.json_lines import METRICS_FILE, json_lines
from megarq.errors import DataError

HOUR = 3600.0
_TAIL = 16 * 2**20
"""Bytes of metrics.jsonl that are read: an hour of steps of 0.2 s."""
_ENDS = {"stopped": "stopped", "failed": "failed", "finished": "finished"}
_SILENT_SECONDS, _SILENT_STEPS = 120.0, 20.0
"""A run that has said nothing for both of these is silent: it hangs, saves for long, or died."""
_WARNINGS = 5


@dataclass
class Status:
    """What a person wants to know of a run; None where it is not known yet. Times are in seconds."""

    run: str
    state: str
    """"running", "silent" (nothing came for long), "stopped" (saved, as asked), "failed" or "finished"."""
    reason: str | None
    """Why it failed."""
    quiet_seconds: float
    """Since its last sign of life."""
    step: int
    steps: int | None
    eta_seconds: float | None
    """At the pace of the last hour, pauses between steps included."""
    losses: dict[str, float]
    """Of the last step."""
    loss_hour_ago: float | None
    images_per_second: float | None
    """Over the last hour, pauses between steps included, since the last start."""
    mfu: float | None
    """Of the last step."""
    step_seconds: float | None
    """Median of the last hour."""
    data_share: float | None
    """Of the last hour's steps, waiting for data, on the rank that waits most."""
    stall_share: float | None
    """Of the last hour, steps that waited for a checkpoint to be copied or written."""
    memory_gib: float | None
    """Peak of the rank that has most."""
    slowest_rank: int | None
    """By its own work on the last probe."""
    ranks: int | None
    hosts: list[str]
    job: str | None
    """SLURM's number of the job."""
    checkpoint_step: int | None
    checkpoint_age: float | None
    checkpoint_seconds: float | None
    """That writing it took, beside the training."""
    starts: int
    deaths: int
    """Starts that followed no orderly end, or a fault of the machine."""
    lost_samples: int
    """Of the epoch, those that others stood in for since the last start."""
    skipped: int
    """Steps that were not finite."""
    rolled_back: int
    warnings: list[str]
    """The newest, oldest first."""


def status(run: Path, now: float | None = None) -> Status:
    """Read a run's folder. Raises DataError where it is not one."""
    events = read_events(run)
    lines = [values for _, values in json_lines(run / METRICS_FILE, "step", "loss", "time", last_bytes=_TAIL)]
    if not events:
        raise DataError(f"{run} holds no events.jsonl: it is no run, or none that has begun. Give a run's --output.")
    now = time.time() if now is None else now
    started = [event for event in events if event["event"] == "started"]
    start = started[-1] if started else {}
    last = lines[-1] if lines else {}
    hour = [line for line in lines if line["time"] >= max(start.get("time", 0), last["time"] - HOUR)]
    heard = max(events[-1]["time"], last.get("time", 0))
    usual = median(line["step_seconds"] for line in hour) if hour else None
    state, reason = _state(events, now - heard, usual)
    pace = _pace(hour)
    step, steps = max(last.get("step", 0), start.get("step", 0)), start.get("steps")
    saved: dict[str, Any] = next((event for event in reversed(events) if event["event"] == "checkpoint"), {})
    return Status(
        run=str(run),
        state=state,
        reason=reason,
        quiet_seconds=now - heard,
        step=step,
        steps=steps,
        eta_seconds=(steps - step) / pace if pace and steps and state == "running" else None,
        losses={key: value for key, value in last.items() if key.endswith("loss") and value is not None},
        loss_hour_ago=_loss_hour_ago(lines, last),
        images_per_second=pace and pace * last["samples_seen"] / max(last["step"], 1),
        mfu=last.get("mfu"),
        step_seconds=usual,
        data_share=_share(hour, "data_seconds"),
        stall_share=_share(hour, "checkpoint_stall_seconds"),
        memory_gib=last.get("memory_gib"),
        slowest_rank=last.get("slowest_rank"),
        ranks=start.get("ranks"),
        hosts=start.get("hosts", []),
        job=start.get("job"),
        checkpoint_step=saved.get("step"),
        checkpoint_age=now - saved["time"] if saved else None,
        checkpoint_seconds=saved.get("seconds"),
        starts=len(started),
        deaths=_deaths(events),
        lost_samples=last.get("lost_in_epoch", 0),
        skipped=sum(event["event"] == "skipped" for event in events),
        rolled_back=sum(event["event"] == "rolled back" for event in events),
        warnings=[_told(event) for event in events if event["event"] == "warning"][-_WARNINGS:],
    )


def _state(events: list[dict[str, Any]], quiet: float, usual: float | None) -> tuple[str, str | None]:
    last = next((event for event in reversed(events) if event["event"] in ("started", *_ENDS)), {"event": "started"})
    if last["event"] in _ENDS:
        return _ENDS[last["event"]], last.get("text")
    silent = quiet > max(_SILENT_SECONDS, _SILENT_STEPS * (usual or 0))
    return ("silent" if silent else "running"), None


def _deaths(events: list[dict[str, Any]]) -> int:
    """Starts that came while, by the events, the run was still going on."""
    going, deaths = False, 0
    for event in events:
        if event["event"] == "started":
            deaths += going
            going = True
        elif event["event"] in _ENDS:
            going = event.get("fault", False)
    return deaths


def _pace(lines: list[dict[str, Any]]) -> float | None:
    """Steps a second from the first of these lines to the last."""
    if len(lines) < 2 or lines[-1]["time"] <= lines[0]["time"]:
        return None
    pace: float = (lines[-1]["step"] - lines[0]["step"]) / (lines[-1]["time"] - lines[0]["time"])
    return pace or None


def _loss_hour_ago(lines: list[dict[str, Any]], last: dict[str, Any]) -> float | None:
    before = [line["loss"] for line in lines if line["time"] <= last["time"] - HOUR]
    return before[-1] if before else None


def _share(lines: list[dict[str, Any]], name: str) -> float | None:
    """Of the steps' time and what they waited for between them."""
    total = sum(line["step_seconds"] + line.get("checkpoint_stall_seconds", 0) for line in lines)
    return sum(line.get(name, 0) for line in lines) / total if total else None


def _told(event: dict[str, Any]) -> str:
    return f"step {event['step']}: {event.get('text', '')}"


def as_json(found: Status) -> dict[str, Any]:
    """For another program."""
    return asdict(found)


def page(it: Status) -> str:
    """For a terminal: a line a matter."""
    state = _parts((it.state.upper(), "{}"), (_where(it) or None, "on {}"), (it.job, "job {}"))
    lines = [
        ("state", f"{state}; last sign of life {duration(it.quiet_seconds)} ago"),
        ("why", it.reason),
        ("step", _parts((it.step, "{:,}"), (it.steps, "of {:,}"), (_done(it), "{:.1%}"), (_left(it), "{} left"))),
        ("loss", _losses(it)),
        ("speed", _speed(it)),
        ("checkpoint", _checkpoint(it) or "none yet"),
        ("restarts", _restarts(it)),
        ("lost", f"{it.lost_samples:,} samples of this epoch, for which others stand in" if it.lost_samples else None),
        *(("WARNING", warning) for warning in it.warnings),
    ]
    return "\n".join([it.run, *(f"  {name:<11}{text}" for name, text in lines if text)])


def _parts(*parts: tuple[Any, str]) -> str:
    """Values that are known, each in its words."""
    return ", ".join(words.format(value) for value, words in parts if value is not None)


def _where(it: Status) -> str:
    return f"{it.ranks} ranks of {', '.join(_short(it.hosts))}" if it.ranks else ""


def _done(it: Status) -> float | None:
    return it.step / it.steps if it.steps else None


def _left(it: Status) -> str | None:
    return duration(it.eta_seconds) if it.eta_seconds is not None else None


def _losses(it: Status) -> str:
    terms = [(value, name.removesuffix("_loss") + " {:.4g}") for name, value in it.losses.items() if name != "loss"]
    return _parts((it.losses.get("loss"), "{:.4g}"), (it.loss_hour_ago, "an hour ago {:.4g}"), *terms)


def _speed(it: Status) -> str:
    if it.state == "silent":
        return ""
    return _parts(
        (it.images_per_second, "{:,.1f} images/s over the last hour"),
        (it.step_seconds, "a step {:.3g} s"),
        (it.mfu, "MFU {:.0%}"),
        (it.data_share, "waiting for data {:.1%}"),
        (it.memory_gib, "memory {:.1f} GiB"),
        (it.slowest_rank, "slowest rank {}"),
    )


def _checkpoint(it: Status) -> str:
    age = duration(it.checkpoint_age) if it.checkpoint_age is not None else None
    return _parts(
        (it.checkpoint_step, "step {:,}"),
        (age, "{} ago"),
        (it.checkpoint_seconds, "written in {:.1f} s"),
        (it.stall_share if age else None, "steps wait for them {:.2%} of the time"),
    )


def _restarts(it: Status) -> str:
    return _parts(
        (max(it.starts - 1, 0), "{}"),
        (it.deaths or None, "{} after a death or fault"),
        (it.rolled_back or None, "went back {} times"),
        (it.skipped or None, "{} steps skipped"),
    )


def _short(hosts: list[str]) -> list[str]:
    return hosts if len(hosts) <= 4 else [*hosts[:3], f"{len(hosts) - 3} more"]


def duration(seconds: float) -> str:
    """3d04h, 9h12m, 4m05s or 12s."""
    whole = max(0, int(seconds))
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{smaller}"
    return f"{whole}s"
