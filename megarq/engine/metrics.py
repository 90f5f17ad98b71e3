"""What a run tells: a console line, a line of metrics.jsonl, TensorBoard events, and pictures."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarq.engine.events import add_event, read_events
from megarq.engine.json_lines import METRICS_FILE, json_lines
from megarq.engine.pictures import save_png
from megarq.errors import MegarqError, Stopped, is_fault
from megarq.files import write_atomically

PICTURES = "pictures"
_GIB = 2**30
_PEAK_TFLOPS = {
    "H100 PCIe": {"bf16": 756.0, "tf32": 378.0, "fp32": 51.0},
    "H100 NVL": {"bf16": 835.0, "tf32": 417.5, "fp32": 60.0},
    "H200": {"bf16": 989.0, "tf32": 494.5, "fp32": 67.0},
    "H100": {"bf16": 989.0, "tf32": 494.5, "fp32": 67.0},
    "H800": {"bf16": 989.0, "tf32": 494.5, "fp32": 67.0},
    "A100": {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5},
    "A800": {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5},
    "L40S": {"bf16": 362.0, "tf32": 183.0, "fp32": 91.6},
    "V100": {"bf16": 125.0, "tf32": 15.7, "fp32": 15.7},
}
"""Dense, by what is multiplied in; a V100 has no TF32."""
_SHORT_NAMES = {
    "image_loss": "img",
    "caption_loss": "txt",
    "reconstruction_loss": "rec",
    "perceptual_loss": "lpips",
    "commitment_loss": "commit",
    "generator_loss": "gen",
    "adaptive_weight": "lambda",
    "discriminator_loss": "disc",
}


def peak_tflops(device: torch.device, configured: float | None, products: str) -> float | None:
    """Dense peak of one device in TFLOP/s: as configured, else by the GPU's name; None where unknown.

    products: what the model's products are computed in, "bf16", "tf32" or "fp32".
    """
    if configured is not None:
        return configured
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peaks[products] for key, peaks in _PEAK_TFLOPS.items() if key in name), None)


def memory_gib(device: torch.device) -> float:
    """Peak memory allocated on the GPU so far; resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / _GIB


@dataclass
class Findings:
    """What a task has to tell of a step, beside its losses."""

    values: dict[str, Any] = field(default_factory=dict)
    """For the step's line of metrics."""
    warnings: list[str] = field(default_factory=list)
    """Sentences without a full stop, for the console and the run's events."""
    lines: list[str] = field(default_factory=list)
    """For the console."""
    charts: dict[str, Tensor] = field(default_factory=dict)
    """Drawings [3, H, W] in [0, 1] for TensorBoard, by name."""


class MetricsLog:
    """Rank 0's log of a run; on other ranks every call does nothing."""

    def __init__(self, run: Path, rank: int, start_step: int, monitor: Any = None) -> None:
        """Lines after `start_step`, of steps that a killed run did after its last checkpoint, are dropped.

        `monitor` is DeepSpeed's, where ds_config turns one on: it is given every number too.
        """
        self._active, self._step, self._monitor = rank == 0, start_step, monitor
        self._saved_in: float | None = None
        self.restarts = 0
        """How often the run was started before this time; known to rank 0."""
        if not self._active:
            return
        self._run = run
        self.restarts = sum(event["event"] == "started" for event in read_events(run))
        self._open(start_step)

    def _open(self, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = self._run / METRICS_FILE
        kept = [line for line, values in json_lines(path, "step") if values["step"] <= start_step]
        write_atomically(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(self._run / "tensorboard", purge_step=start_step + 1)

    def go_back(self, step: int) -> None:
        """Drop the lines of later steps, which are done again."""
        if self._active:
            self.close()
            self._open(step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line, and its numbers, words and, as histograms, lists of numbers to TensorBoard."""
        if not self._active:
            return
        self._step = step
        if self._saved_in is not None:
            values = {**values, "checkpoint_seconds": self._saved_in}
            self._saved_in = None
        line = {"step": step, **values}
        with self._writing():
            self._file.write(json.dumps({k: None if _undefined(v) else v for k, v in line.items()}) + "\n")
            self._file.flush()
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(name, value, step)
                elif isinstance(value, str):
                    self._events.add_text(name, value, step)
                elif isinstance(value, list):
                    self._events.add_histogram(name, torch.tensor(value), step)
        if self._monitor is not None:
            self._pass_on(step, values)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Errors of the disk say where it is."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), error.filename or str(self._run)) from error

    def _pass_on(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = [(name, value, step) for name, value in values.items() if isinstance(value, int | float)]
        try:
            self._monitor.write_events(numbers)
        except Exception as error:  # whatever ails a service outside, the training goes on
            self._monitor = None
            self.warn(step, f"DeepSpeed's monitor failed ({error}) and is not used again before the next start")

    def pictures(self, step: int, name: str, grid: Tensor, text: str | None = None) -> None:
        """Add a picture [3, H, W] in [0, 1], with what it shows, as pictures/step-00000120.png too."""
        if not self._active:
            return
        with self._writing():
            save_png(self._run / PICTURES / f"step-{step:08d}.png", grid)
            self._events.add_image(name, grid, step)
            if text is not None:
                self._events.add_text(f"{name}/prompts", text, step)

    def chart(self, step: int, name: str, chart: Tensor) -> None:
        """Add a drawing [3, H, W] in [0, 1] to TensorBoard."""
        if self._active:
            with self._writing():
                self._events.add_image(name, chart, step)

    def say(self, message: str) -> None:
        """Print a line, where somebody reads it: a launcher may be dead, and the disk of its output full."""
        if self._active:
            with suppress(OSError):
                print(message, flush=True)

    def event(self, event: str, step: int, **values: Any) -> None:
        """Add to the run's events."""
        if self._active:
            with self._writing():
                add_event(self._run, event, step, **values)

    def saved(self, step: int, seconds: float) -> None:
        """A step's checkpoint can be seen, after so many seconds of writing; the next line of metrics has them too."""
        self._saved_in = round(seconds, 3)
        self.event("checkpoint", step, seconds=self._saved_in)

    def failed(self, error: Exception) -> None:
        """The run ends by an error, after the last step that was written: close, as far as the disk lets us."""
        if not isinstance(error, Stopped):
            fault = is_fault(error) if isinstance(error, MegarqError | OSError) else True
            with suppress(OSError):
                self.event("failed", self._step, text=str(error), fault=fault)
        with suppress(OSError):
            self.close()
        self._active = False

    def warn(self, step: int, warning: str) -> None:
        """Print a warning, and add it to the run's events."""
        self.say(f"step {step}: WARNING: {warning}.")
        self.event("warning", step, text=warning)

    def close(self) -> None:
        """Flush and close the files."""
        if self._active:
            self._file.close()
            self._events.close()


def past_metrics(run: Path, step: int) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics up to a step."""
    return (values for _, values in json_lines(run / METRICS_FILE, "step") if values["step"] <= step)


def _undefined(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class Speed:
    """Images per second of the last step, and the time that is left at the recent pace."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._recent: float | None = None

    def step(self) -> float:
        """Seconds since the last call."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._recent = seconds if self._recent is None else 0.95 * self._recent + 0.05 * seconds
        return seconds

    def skip(self) -> None:
        """Leave out what was done since the last step: validation, pictures, checkpoints."""
        self._last = time.monotonic()

    def eta(self, steps_left: int) -> str:
        """Time left, as 9h12m, 4m05s or 12s."""
        seconds = int((self._recent or 0) * steps_left)
        if seconds >= 3600:
            return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
        return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def console_line(step: int, total: int, values: Mapping[str, Any], eta: str) -> str:
    """`step 120/50000 | loss 5.871 | img 6.31 txt 1.9 | grad 0.83 | lr 3.1e-4 | 412 img/s | ...`."""
    parts = [f"step {step}/{total}", f"loss {values['loss']:.4g}"]
    terms = [f"{short} {values[name]:.3g}" for name, short in _SHORT_NAMES.items() if values.get(name) is not None]
    if terms:
        parts.append(" ".join(terms))
    parts.append(f"grad {values['grad_norm']:.2g}")
    mantissa, exponent = f"{values['lr']:.1e}".split("e")
    parts += [f"lr {mantissa}e{int(exponent)}", f"{values['images_per_second']:.0f} img/s"]
    if values.get("mfu") is not None:
        parts.append(f"mfu {values['mfu']:.0%}")
    parts += [f"mem {values['memory_gib']:.1f} GiB", f"eta {eta}"]
    return " | ".join(parts)
