"""How a rank's micro-batches go forward and backward: through its whole model, or through its stage of a pipeline."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megarq.parallel.topology import ProcessGroups
from megarq.transformer.stages import Stage

Terms = dict[str, Tensor]
"""Scalars by name, "loss" among them."""


class Passes(Protocol):
    """Training and evaluation of an engine."""

    def train(self, micro_batches: Sequence[Any], seeds: Sequence[int]) -> Terms:
        """One optimiser step; the mean of the micro-batches' terms. Dropout of micro-batch i comes from seeds[i]."""
        ...

    def evaluate(self, micro_batches: Sequence[Any]) -> list[Terms]:
        """Terms of each micro-batch, without gradients."""
        ...


class PlainPasses:
    """A DeepSpeedEngine whose module holds all layers."""

    def __init__(self, engine: Any, terms: Callable[[Any], Terms]) -> None:
        """`terms` runs the engine on a micro-batch."""
        self._engine, self._terms = engine, terms

    def train(self, micro_batches: Sequence[Any], seeds: Sequence[int]) -> Terms:
        """One optimiser step."""
        done: list[Terms] = []
        for micro_batch, seed in zip(micro_batches, seeds, strict=True):
            # Dropout is a function of the step, not of what ran before: a checkpoint stores no random state.
            torch.manual_seed(seed)
            terms = self._terms(micro_batch)
            self._engine.backward(terms["loss"])
            self._engine.step()
            done.append({name: value.detach().float() for name, value in terms.items()})
        return {name: torch.stack([terms[name] for terms in done]).mean() for name in done[0]}

    def evaluate(self, micro_batches: Sequence[Any]) -> list[Terms]:
        """Terms of each micro-batch."""
        return [self._terms(micro_batch) for micro_batch in micro_batches]


class PipelinePasses:
    """A PipelineEngine around one stage. The last stage knows the terms, and tells the others."""

    def __init__(
        self,
        engine: Any,
        stage: Stage,
        groups: ProcessGroups,
        example: Callable[[Any], tuple[tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor]]],
        terms: Callable[..., Terms],
        names: Sequence[str],
    ) -> None:
        """Takes over the engine's loss function.

        Args:
            engine: a PipelineEngine.
            stage: the layers of this rank.
            groups: this rank's process groups.
            example: from a micro-batch to what the first stage reads and what the last one compares with: targets,
                condition, and which samples count.
            terms: from the last stage's losses, condition, and which samples count, to the terms.
            names: of the terms, in the same order on all ranks.
        """
        self._engine, self._groups, self._example, self._names = engine, groups, example, list(names)
        self._last = groups.topology.pipeline_rank == groups.topology.pp - 1
        self._loaded: deque[tuple[Tensor, Tensor]] = deque()
        self._seeds: Iterator[int] = iter(())
        self._done: list[Terms] = []

        def loss(losses: tuple[Tensor, ...], answers: tuple[Tensor, ...]) -> Tensor:
            found = terms(losses, *answers[1:])
            self._done.append({name: value.detach().float() for name, value in found.items()})
            return found["loss"]

        engine.module.loss_fn = loss
        stage.register_forward_pre_hook(self._seed)
        if self._last:
            stage.answers = self._loaded.popleft

    def _seed(self, stage: nn.Module, state: Any) -> None:
        """A stage sees the micro-batches in order, whatever it does between them."""
        if stage.training:
            torch.manual_seed(next(self._seeds))

    def _load(self, micro_batch: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        inputs, answers = self._example(micro_batch)
        if self._last:
            self._loaded.append(answers[:2])
        return inputs, answers

    def train(self, micro_batches: Sequence[Any], seeds: Sequence[int]) -> Terms:
        """One optimiser step, by DeepSpeed's 1F1B schedule."""
        self._done, self._seeds = [], iter(seeds)
        self._engine.train_batch(map(self._load, micro_batches))
        told = self._tell(len(micro_batches))
        return {name: torch.stack([terms[name] for terms in told]).mean() for name in self._names}

    def evaluate(self, micro_batches: Sequence[Any]) -> list[Terms]:
        """Terms of each micro-batch, by DeepSpeed's inference schedule."""
        self._done = []
        self._engine.eval_batch(map(self._load, micro_batches), num_micro_batches=len(micro_batches))
        return self._tell(len(micro_batches))

    def _tell(self, count: int) -> list[Terms]:
        """The last stage's terms on all stages."""
        values = torch.zeros(count, len(self._names), device=self._engine.device)
        if self._last:
            values.copy_(torch.stack([torch.stack([terms[name] for name in self._names]) for terms in self._done]))
        topology = self._groups.topology
        dist.broadcast(values, topology.on_stage(topology.pp - 1), group=self._groups.pipeline)
        return [dict(zip(self._names, row.unbind(), strict=True)) for row in values]
