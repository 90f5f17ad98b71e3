"""The training loop. It knows steps, not models: what is trained is a Task."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megarq.checkpoint.writer import CheckpointWriter
from megarq.config.run import CheckpointConfig, LogConfig, TrainConfig
from megarq.data.order import LoaderState
from megarq.engine.metrics import Findings, MetricsLog, Speed, console_line, memory_gib
from megarq.engine.passes import Passes
from megarq.engine.schedule import learning_rate
from megarq.engine.state import EngineState
from megarq.errors import DivergenceError
from megarq.parallel.initialization import derived_seed
from megarq.parallel.topology import ProcessGroups


class Batch(Protocol):
    """One rank's share of a global batch."""

    state: LoaderState
    """Where the loader stands after this batch."""


class Task(Protocol):
    """What is trained: how a micro-batch becomes losses, and what is looked at now and then."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of all losses; one that `losses` leaves out is null in the metrics."""
        ...

    def micro_batches(self, batch: Any, count: int) -> list[Any]:
        """Equal parts of a rank's share, in order."""
        ...

    @property
    def passes(self) -> Passes:
        """How micro-batches go forward and backward; the term "loss" is the one that is minimised."""
        ...

    def validate(self) -> dict[str, float] | None:
        """Means over the held-out data, the same on all ranks; None without such data."""
        ...

    def observe(self, step: int, values: Mapping[str, Any]) -> Findings:
        """What else there is to tell after a step with these metrics; called on all ranks."""
        ...

    def pictures(self) -> tuple[Tensor, str] | None:
        """A grid [3, H, W] in [0, 1] and what it shows; called on all ranks, None where there is nothing to show."""
        ...


@dataclass
class RunPlan:
    """Everything about a run that is neither model nor data."""

    run: Path
    train: TrainConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    steps: int
    warmup: int
    accumulation: int
    metadata: Mapping[str, Any]
    """What a checkpoint says of its run beside the step: architecture and configuration."""
    flops_per_image: Callable[[int], float]
    """To train on an image in a step, counted from 1."""
    peak_tflops: float | None


class Trainer:
    """Runs a task from its first or last checkpointed step to the end of the plan."""

    def __init__(
        self,
        plan: RunPlan,
        engine: Any,
        state: EngineState,
        task: Task,
        groups: ProcessGroups,
        device: torch.device,
        log: MetricsLog,
        writer: CheckpointWriter,
        start_step: int = 0,
    ) -> None:
        self.plan, self.engine, self.state, self.task = plan, engine, state, task
        self.groups, self.device, self.log, self.step = groups, device, log, start_step
        self.writer = writer
        self._speed = Speed()

    def fit(self, batches: Iterable[Batch]) -> None:
        """Train until the plan's last step; every rank calls this together.

        Raises DivergenceError on all ranks where a loss or the gradient is not finite.
        """
        plan = self.plan
        iterator = iter(batches)
        self._speed.skip()
        while self.step < plan.steps:
            batch = next(iterator)
            terms = self._update(batch)
            self.step += 1
            _check_finite(self.step, terms)
            self._report(terms, batch)
            last = self.step == plan.steps
            if plan.log.validate_every and (last or self.step % plan.log.validate_every == 0):
                self._validate()
            if plan.log.sample_every and (last or self.step % plan.log.sample_every == 0):
                self._show()
            if last or self.step % plan.checkpoint.every == 0:
                self._save(batch)

    def _update(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; returns the batch's mean losses over all micro-batches and ranks."""
        train, engine = self.plan.train, self.engine
        rate = learning_rate(self.step, self.plan.steps, self.plan.warmup, train)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        engine.train()
        micro_batches = self.task.micro_batches(batch, self.plan.accumulation)
        place = self.groups.topology.data_rank
        seeds = [derived_seed(train.seed, self.step, index, place) for index in range(len(micro_batches))]
        terms = self.task.passes.train(micro_batches, seeds)
        self.state.update_ema()
        means = torch.stack(list(terms.values()))
        self._mean_over_data(means)
        norm = engine.get_global_grad_norm()
        return dict(zip(terms, means.tolist(), strict=True)) | {"grad_norm": float(norm), "lr": rate}

    def _mean_over_data(self, values: Tensor) -> None:
        dist.all_reduce(values, group=self.groups.data)
        values /= self.groups.topology.dp

    def _report(self, terms: dict[str, float], batch: Batch) -> None:
        plan = self.plan
        images_per_second = plan.train.global_batch_size / max(self._speed.step(), 1e-9)
        values: dict[str, Any] = {
            **dict.fromkeys(self.task.terms),
            **terms,
            "images_per_second": images_per_second,
            "mfu": None,
        }
        if plan.peak_tflops:
            achieved = plan.flops_per_image(self.step) * images_per_second / self.groups.topology.world_size
            values["mfu"] = achieved / (plan.peak_tflops * 1e12)
        values |= {
            "memory_gib": memory_gib(self.device),
            "samples_seen": self.step * plan.train.global_batch_size,
            "epoch": batch.state.epoch,
        }
        found = self.task.observe(self.step, values)
        self.log.write(self.step, values | found.values)
        if self.step % plan.log.console_every == 0 or self.step in (1, plan.steps):
            self.log.say(console_line(self.step, plan.steps, values, self._speed.eta(plan.steps - self.step)))
        for line in found.lines:
            self.log.say(f"step {self.step}: {line}")
        for name, chart in found.charts.items():
            self.log.chart(self.step, name, chart)

    def _validate(self) -> None:
        self.engine.eval()
        with torch.no_grad():
            values = self.task.validate()
        if values is not None:
            self.log.write(self.step, values)
            self.log.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self._speed.skip()

    def _show(self) -> None:
        self.engine.eval()
        with torch.no_grad():
            shown = self.task.pictures()
        if shown is not None:
            self.log.pictures(self.step, "pictures", *shown)
        self._speed.skip()

    def _save(self, batch: Batch) -> None:
        metadata = {
            **self.plan.metadata,
            **self.state.metadata(),
            "loader": asdict(batch.state),
        }
        self.writer.save(self.step, self.state.tensors(), metadata)
        self._speed.skip()


def _check_finite(step: int, values: Mapping[str, float]) -> None:
    """Raise DivergenceError where a loss or the gradient's norm, the same on all ranks, is not a finite number."""
    # Where the engine does not look for overflows, -1 is the norm of a gradient that is not finite.
    wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
    if values["grad_norm"] < 0:
        wrong["grad_norm"] = math.inf
    if wrong:
        named = ", ".join(f"{name} is {value:g}" for name, value in wrong.items())
        raise DivergenceError(
            f"step {step}: {named}; training stops, and nothing of this step is saved. Give the same command again "
            "with a lower train.lr or a longer warm-up: it goes on from the last checkpoint, if there is one."
        )
