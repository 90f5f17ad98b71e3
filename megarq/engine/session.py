"""What both kinds of run share: joining the job, the run's folder, and handing everything to the Trainer."""

import json
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megarq.checkpoint.format import Checkpoint
from megarq.checkpoint.run_folder import newest_checkpoint
from megarq.checkpoint.writer import CheckpointWriter
from megarq.config.deepspeed import batch_sizes
from megarq.config.load import save_config
from megarq.config.run import RQTransformerRunConfig, RQVAERunConfig
from megarq.config.schema import flat
from megarq.data.order import LoaderState
from megarq.engine.build import build_engine, take_monitor
from megarq.engine.kernels import choose_kernels
from megarq.engine.loop import Batch, RunPlan, Task, Trainer
from megarq.engine.metrics import MetricsLog, peak_tflops
from megarq.engine.preflight import Preflight
from megarq.engine.run_lock import RunLock
from megarq.engine.schedule import run_length
from megarq.engine.state import Beside, EngineState
from megarq.errors import ConfigError
from megarq.files import file_sha256, write_atomically
from megarq.launch.stop import interrupts_noted
from megarq.launch.watchdog import SLOWER, Watchdog
from megarq.parallel.together import gather_objects, together
from megarq.parallel.topology import ProcessGroups, Topology

RESOLVED = "config.resolved.yaml"


@dataclass
class Session:
    """One rank of one run, joined to the job."""

    config: RQTransformerRunConfig | RQVAERunConfig
    ds: Mapping[str, Any]
    """DeepSpeed's configuration, complete."""
    run: Path
    groups: ProcessGroups
    device: torch.device
    checkpoint: Checkpoint | None
    """Where the run goes on; None for a new one."""
    launcher: str
    """What started the ranks."""
    preflight: Preflight | None
    """Checks before the first step, begun; None for none."""
    lock: RunLock
    """Rank 0's on the run's folder."""
    watchdog: Watchdog
    """Of this process, at work."""

    @classmethod
    def open(
        cls,
        config: RQTransformerRunConfig | RQVAERunConfig,
        ds: Mapping[str, Any],
        topology: Topology,
        run: Path,
        device: torch.device,
        launcher: str = "none",
        preflight: Preflight | None = None,
        watchdog: Watchdog | None = None,
    ) -> "Session":
        """Create the groups and the run's folder, or find the checkpoint to go on from; every rank calls this.

        `preflight` has met the ranks; it goes on with their groups. `watchdog` is at work, and is told of all steps.

        Raises ConfigError where the folder holds a run of another model, CheckpointError where no checkpoint is whole.
        """
        groups = ProcessGroups.build(topology, config.parallel.sequence)
        watchdog = watchdog or Watchdog.none()
        if preflight is not None:
            preflight.try_collectives(groups, partial(watchdog.mark, 0))
        session = cls(config, ds, run, groups, device, None, launcher, preflight, RunLock(run), watchdog)
        session.prepare("the run's folder")
        session.keep_beside(lambda run: session.lock.take())
        session.checkpoint = newest_checkpoint(run, topology.rank, topology.world_size, gather_objects)
        if session.checkpoint is not None:
            _check_same_model(session.checkpoint, config, run)
        session.keep_beside(lambda run: save_config(config, run / RESOLVED))
        return session

    @property
    def start(self) -> LoaderState:
        """Where the data go on."""
        return LoaderState(**self.checkpoint.metadata["loader"]) if self.checkpoint else LoaderState()

    @property
    def step(self) -> int:
        """The step that the run goes on from."""
        return self.checkpoint.metadata["step"] if self.checkpoint else 0

    def prepare(self, what: str) -> None:
        """Let the watchdog know what comes next before the first step."""
        self.watchdog.mark(self.step, f"preparing {what}", SLOWER)

    @property
    def products(self) -> str:
        """What most FLOPs are computed in: torch uses TF32 for cuDNN's convolutions of fp32, but not for matrices."""
        precision = self.config.train.precision
        return "tf32" if precision == "fp32" and isinstance(self.config, RQVAERunConfig) else precision

    def keep_beside(self, copy: Callable[[Path], object]) -> None:
        """Let rank 0 write something into the run's folder; all ranks raise where it cannot (collective)."""

        def on_rank_zero() -> None:
            if self.groups.topology.rank == 0:
                self.run.mkdir(parents=True, exist_ok=True)
                copy(self.run)

        together(on_rank_zero)

    def see(self, *paths: str | Path | None, contents: bool) -> None:
        """What the command line names, None left out, is the same for all ranks, or there for none (collective)."""
        self.prepare("the data")
        if self.preflight is not None:
            self.preflight.see([Path(path) for path in paths if path is not None], contents)

    def read(self, files: Mapping[Path, int]) -> None:
        """See whether this rank can read the files, of these sizes, that it will read (collective)."""
        if self.preflight is not None:
            self.preflight.read(files)

    def train(
        self,
        module: nn.Module,
        decayed: Callable[[str], bool],
        make_task: Callable[[Any], Task],
        batches: Iterable[Batch],
        samples_per_epoch: int,
        flops_per_image: Callable[[int], float],
        metadata: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        beside: Beside | None = None,
    ) -> None:
        """Build the engine, take over the checkpoint, and fit.

        Args:
            module: what is trained, with its first weights.
            decayed: whether a parameter of this name has weight decay.
            make_task: from the engine to the task.
            batches: this rank's shares of the global batches, from `start` on.
            samples_per_epoch: for lengths given in epochs.
            flops_per_image: to train on an image in a step, for the MFU.
            metadata: what else every checkpoint should say.
            notes: lines for the log, said when the run opens.
            beside: what the task trains beside the engine.
        """
        config, topology = self.config, self.groups.topology
        steps, warmup = run_length(config.train, samples_per_epoch)
        self.prepare("the engine")
        engine = build_engine(module, config.train, self.ds, self.groups, decayed, self.device)
        state = EngineState(engine, self.groups, config.train.ema_decay, beside)
        step = self.step
        if self.checkpoint is not None:
            self.prepare(f"to go on from {self.checkpoint.folder.name}")
            state.load(self.checkpoint)
        plan = RunPlan(
            run=self.run,
            train=config.train,
            checkpoint=config.checkpoint,
            log=config.log,
            faults=config.faults,
            steps=steps,
            warmup=warmup,
            accumulation=batch_sizes(config.train, topology.dp)[1],
            metadata={"architecture": config.architecture, "config": asdict(config), **(metadata or {})},
            flops_per_image=flops_per_image,
            peak_tflops=peak_tflops(self.device, config.log.peak_tflops, self.products),
        )
        if self.preflight is not None:
            size = sum(gather_objects(state.saved_bytes()))
            self.preflight.make_room(size, config.checkpoint, -(-max(0, steps - step) // config.checkpoint.every))
        log = MetricsLog(self.run, topology.rank, step, take_monitor(engine))
        hosts, job = sorted(set(gather_objects(socket.gethostname()))), os.environ.get("SLURM_JOB_ID")
        log.event("started", step, steps=steps, ranks=topology.world_size, hosts=hosts, launcher=self.launcher, job=job)
        if self.preflight is not None:
            self.preflight.tell(log, step)
        for line in (self._opening(plan, step), self._means(plan), *notes):
            log.say(line)
        if warmup > steps:
            log.warn(step, f"the warm-up takes {warmup} steps, the whole run {steps}: train.lr is never reached")
        for change in self._changes():
            log.say(f"changed since the checkpoint: {change}")
        try:
            with CheckpointWriter(self.run, config.checkpoint, topology, step, log.say, log.saved) as writer:
                task = make_task(engine)
                trainer = Trainer(plan, engine, state, task, self.groups, self.device, log, writer, self.watchdog, step)
                with interrupts_noted():
                    trainer.fit(batches)
        except Exception as error:
            self.watchdog.close()  # of a hang, what the end of another rank does to this one is not worth telling
            log.failed(error)
            raise
        finally:
            log.close()
            self.lock.release()
            engine.destroy()

    def _changes(self) -> list[str]:
        """Keys whose values differ from those that the checkpoint was saved with."""
        if self.checkpoint is None:
            return []
        saved, ours = flat(self.checkpoint.metadata["config"]), flat(json.loads(json.dumps(asdict(self.config))))
        keys = sorted(saved.keys() | ours.keys())
        return [f"{key}: {saved.get(key)} -> {ours.get(key)}" for key in keys if saved.get(key) != ours.get(key)]

    def _opening(self, plan: RunPlan, step: int) -> str:
        topology, train = self.groups.topology, self.config.train
        stage = self.ds["zero_optimization"]["stage"]
        ranks = f"{topology.world_size} x {self.device.type} (launcher: {self.launcher}): "
        ranks += f"dp {topology.dp}, tp {topology.tp}, pp {topology.pp}"
        start = f"going on from step {step}" if step else "starting"
        if step >= plan.steps:
            start = f"already at step {step}, nothing to do"
        return (
            f"{start} | {plan.steps} steps of {train.global_batch_size} samples | {ranks}, ZeRO-{stage}, "
            f"{train.precision} | {self.run}"
        )

    def _means(self, plan: RunPlan) -> str:
        """What computes, and what the MFU is held against."""
        kernels = choose_kernels(self.config.train.kernels, self.device, self.ds).describe()
        peak = "unknown" if plan.peak_tflops is None else f"{plan.peak_tflops:g} TFLOP/s (dense {self.products})"
        cost = f"{plan.flops_per_image(plan.steps) / 1e9:.4g} GFLOP to train on an image"
        return f"{kernels} | mfu against a device's peak: {peak} | {cost}"


def copy_once(source: Path, run: Path, name: str) -> None:
    """Copy a file into the run under `name`, whole or not at all. Raises ConfigError where another is there."""
    target = run / name
    if target.exists():
        if file_sha256(source) != file_sha256(target):
            raise ConfigError(f"{target} differs from {source}: go on with the file that the run was started with.")
        return
    write_atomically(target, source.read_bytes())


def _check_same_model(checkpoint: Checkpoint, config: RQTransformerRunConfig | RQVAERunConfig, run: Path) -> None:
    if checkpoint.metadata["architecture"] != config.architecture:
        raise ConfigError(
            f"--output {run} holds a run of an {checkpoint.metadata['architecture']}, this one trains an "
            f"{config.architecture}. Give another --output."
        )
    saved, ours = checkpoint.metadata["config"]["model"], json.loads(json.dumps(asdict(config.model)))
    differing = sorted(key for key in saved.keys() | ours.keys() if saved.get(key) != ours.get(key))
    for key in differing:
        if key != "dropout":
            raise ConfigError(
                f"--output {run} holds a run with model.{key}={saved.get(key)}, this one has {ours.get(key)}. "
                "Give another --output, or the configuration of the run."
            )
