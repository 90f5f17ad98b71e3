"""The training loop. It knows steps, not models: what is trained is a Task.

What can go wrong in a step, and who sees it:

    a rank hangs                             the watchdog, which ends the job
    a rank dies                              the others' next collective, which raises
    a signal                                 `exchange`, where all ranks agree to save and stop
    a loss or gradient that is not finite    `Guard`: the engine has left the step out, or the run goes back
    ranks that differ                        `Replicas`, before they are saved: the run goes back
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megarq.checkpoint.run_folder import newest_checkpoint
from megarq.checkpoint.writer import CheckpointWriter
from megarq.config.faults import FaultConfig
from megarq.config.run import CheckpointConfig, LogConfig, TrainConfig
from megarq.data.order import LoaderState
from megarq.engine.guard import Guard, not_finite
from megarq.engine.metrics import Findings, MetricsLog, Speed, console_line, memory_gib
from megarq.engine.passes import Passes
from megarq.engine.ranks import RankReport, Ranks, by_rank, summary
from megarq.engine.replicas import Replicas
from megarq.engine.schedule import learning_rate
from megarq.engine.state import EngineState
from megarq.errors import DivergenceError, FaultError, Stopped
from megarq.launch.stop import asked_to_stop
from megarq.launch.watchdog import SLOWER, Watchdog
from megarq.parallel.initialization import derived_seed
from megarq.parallel.together import gather_objects
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
    def skippable(self) -> bool:
        """Whether a step that the optimiser did not make leaves all that is trained as it was."""
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
    faults: FaultConfig
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
        watchdog: Watchdog,
        start_step: int = 0,
    ) -> None:
        self.plan, self.engine, self.state, self.task = plan, engine, state, task
        self.groups, self.device, self.log, self.step = groups, device, log, start_step
        self.writer = writer
        self._watchdog, self._speed = watchdog, Speed()
        self._guard = Guard(plan.faults, task.skippable)
        self._ranks = Ranks(plan.faults, device)
        self._replicas = Replicas(state, groups)
        self._times_back, self._stall = 0, 0.0
        self._slow_mark = SLOWER

    def fit(self, batches: Iterable[Batch]) -> None:
        """Train until the plan's last step; every rank calls this together.

        Raises, on all ranks: Stopped where one was asked to stop, when this step is saved; DivergenceError where going
        back to the last checkpoint does not help, or there is none; FaultError where ranks differ after going back too.
        """
        plan, iterator = self.plan, iter(batches)
        self._speed.skip()
        while self.step < plan.steps:
            batch, waited = self._next(iterator)
            terms = self._update(batch)
            self.step += 1
            ranks = self._report(terms, batch, waited)
            if any(rank.failed for rank in ranks):
                self.writer.finish()  # raises, on all of them
            wrong, must_go_back = self._guard.look(
                what_is_wrong(terms, ranks), ranks[0].loss, self.engine.was_step_applied()
            )
            if must_go_back:
                self._go_back(wrong)
                continue
            if wrong:
                self.log.say(f"step {self.step}: {wrong}; the step is skipped")
                self.log.event("skipped", self.step, reason=wrong)
            else:
                self.state.update_ema()
            stop = any(rank.stop for rank in ranks)
            last = self.step == plan.steps
            if plan.log.validate_every and (last or self.step % plan.log.validate_every == 0):
                self._validate()
            if plan.log.sample_every and (last or self.step % plan.log.sample_every == 0):
                self._show()
            saving = last or stop or self.step % plan.checkpoint.every == 0
            if self._ranks_differ(saving):
                continue
            if saving:
                self._save(batch, good=not wrong)
            if stop and not last:
                self.writer.finish()
                self.log.event("stopped", self.step, reason="asked to")
                raise Stopped(f"step {self.step}: asked to stop; saved, the same command goes on from here")
            self._slow_mark = 1
        self._mark("saving", SLOWER)
        self.writer.finish()
        self.log.event("finished", self.step)

    def _mark(self, doing: str, times: float | None = None) -> None:
        self._watchdog.mark(self.step + 1, doing, times or self._slow_mark)

    def _next(self, batches: Iterator[Batch]) -> tuple[Batch, float]:
        """The next batch, and the seconds that it was waited for."""
        self._mark("waiting for data")
        start = time.monotonic()
        return next(batches), time.monotonic() - start

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
        self._mark("forward and backward")
        terms = self.task.passes.train(micro_batches, seeds)
        means = torch.stack(list(terms.values()))
        self._mark("mean of the losses")
        self._mean_over_data(means)
        norm = engine.get_global_grad_norm()
        return dict(zip(terms, means.tolist(), strict=True)) | {"grad_norm": float(norm), "lr": rate}

    def _mean_over_data(self, values: Tensor) -> None:
        dist.all_reduce(values, group=self.groups.data)
        values /= self.groups.topology.dp

    def _report(self, terms: dict[str, float], batch: Batch, waited: float) -> list[RankReport]:
        """Tell the other ranks, and the log, of the step; returns what all ranks told."""
        plan, seconds = self.plan, self._speed.step()
        self._mark("exchange")
        ranks, slow = self._ranks.exchange(
            self.step,
            step_seconds=seconds,
            data_seconds=waited,
            memory_gib=memory_gib(self.device),
            loss=terms["loss"],
            bad=not_finite(terms) is not None,
            stop=asked_to_stop() is not None,
            failed=self.writer.failed,
        )
        values = {**dict.fromkeys(self.task.terms), **terms, **self._pace(seconds), **summary(ranks)}
        values |= {"samples_seen": self.step * plan.train.global_batch_size, "epoch": batch.state.epoch}
        found = self.task.observe(self.step, values)
        told = self.step % plan.log.console_every == 0 or self.step in (1, plan.steps)
        metrics = values | found.values | {"checkpoint_stall_seconds": self._stall}
        metrics |= {"restarts": self.log.restarts, "time": time.time()}
        self.log.write(self.step, metrics | (by_rank(ranks) if told else {}))
        self._stall = 0.0
        if told:
            self.log.say(console_line(self.step, plan.steps, values, self._speed.eta(plan.steps - self.step)))
        for line in found.lines:
            self.log.say(f"step {self.step}: {line}")
        for warning in (*found.warnings, *slow):
            self.log.warn(self.step, warning)
        for name, chart in found.charts.items():
            self.log.chart(self.step, name, chart)
        return ranks

    def _pace(self, seconds: float) -> dict[str, float | None]:
        """Throughput of a step, and the share of the devices' peak that it is."""
        plan = self.plan
        images_per_second = plan.train.global_batch_size / max(seconds, 1e-9)
        mfu = None
        if plan.peak_tflops:
            achieved = plan.flops_per_image(self.step) * images_per_second / self.groups.topology.world_size
            mfu = achieved / (plan.peak_tflops * 1e12)
        return {"images_per_second": images_per_second, "mfu": mfu}

    def _ranks_differ(self, saving: bool) -> bool:
        """Whether ranks that must agree did not, and the run went back. Raises FaultError where that did not help."""
        every = self.plan.faults.replicas_every
        if not every or not (saving or self.step % every == 0):
            return False
        self._mark("comparing ranks", SLOWER)
        start = time.monotonic()
        differing = self._replicas.differing()
        if saving:
            self._stall += time.monotonic() - start
        if differing is None:
            return False
        self.log.warn(self.step, differing)
        try:
            self._go_back(differing)
        except DivergenceError as error:
            raise FaultError(
                f"step {self.step}: {differing}, and there is no checkpoint to go back to, or going back did not help. "
                "Give the same command again: it goes on from the last checkpoint; on another node if this comes again."
            ) from error
        if differing := self._replicas.differing():
            raise FaultError(
                f"{differing}, and still after going back to step {self.step}. Start again from it: the same command "
                "goes on, on another node if this comes again."
            )
        return True

    def _go_back(self, reason: str | None) -> None:
        """Take over the last checkpoint again; the data go on from here, so what came since it is not seen again.

        Raises DivergenceError where there is none, or this was done too often since it.
        """
        self._mark("going back", SLOWER)
        self.writer.finish()
        topology, limit = self.groups.topology, self.plan.faults.rollbacks
        checkpoint = newest_checkpoint(self.plan.run, topology.rank, topology.world_size, gather_objects)
        why = f"step {self.step}: {reason}; "
        if checkpoint is None or self._times_back == limit:
            tried = f"going back {limit} times did not help" if checkpoint else "there is no checkpoint to go back to"
            raise DivergenceError(
                f"{why}{tried}: training stops, and nothing of this step is saved. Give the same command again with a "
                "lower train.lr or a longer warm-up: it goes on from the last checkpoint, if there is one."
            )
        self._times_back += 1
        self.state.load(checkpoint)
        step = checkpoint.metadata["step"]
        self.log.say(f"{why}going back to step {step}, without the samples since then")
        self.log.event("rolled back", self.step, to=step, reason=reason)
        self.step = step
        self.log.go_back(step)
        self._guard.forget()
        self._speed.skip()

    def _validate(self) -> None:
        self._mark("validation", SLOWER)
        self.engine.eval()
        with torch.no_grad():
            values = self.task.validate()
        if values is not None:
            self.log.write(self.step, values)
            self.log.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self._speed.skip()

    def _show(self) -> None:
        self._mark("pictures", SLOWER)
        self.engine.eval()
        with torch.no_grad():
            shown = self.task.pictures()
        if shown is not None:
            self.log.pictures(self.step, "pictures", *shown)
        self._speed.skip()

    def _save(self, batch: Batch, good: bool) -> None:
        self._mark("saving", SLOWER)
        metadata = {
            **self.plan.metadata,
            **self.state.metadata(),
            "loader": asdict(batch.state),
        }
        start = time.monotonic()
        self.writer.save(self.step, self.state.tensors(), metadata)
        self._stall += time.monotonic() - start
        if good:
            self._times_back = 0
        self._speed.skip()


def what_is_wrong(terms: Mapping[str, float], ranks: Sequence[RankReport]) -> str | None:
    """Which number of a step is not finite, on this rank or another; None where all are on all ranks."""
    bad = [str(rank) for rank, report in enumerate(ranks) if report.bad]
    return not_finite(terms) or (f"a loss or gradient is not finite on rank {', '.join(bad)}" if bad else None)
