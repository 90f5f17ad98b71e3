"""The health of an RQ-VAE in training: its codes are counted, its metrics are watched."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarq.config.run import RQVAERunConfig
from megarq.engine.metrics import Findings
from megarq.engine.pictures import frequency_charts
from megarq.rqvae.alarms import Alarms
from megarq.rqvae.health import CodeCounts, use_of


class Health:
    """Counts codes over windows of `health.every` steps, and raises alarms."""

    def __init__(
        self,
        config: RQVAERunConfig,
        device: torch.device,
        group: dist.ProcessGroup | None,
        history: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """`history` are the metrics of the steps before, where a run goes on; they raise no alarm again."""
        self._every, self._group = config.health.every, group
        self._shared = config.model.shared_codebook
        self._counts = CodeCounts(config.model.sizes, device)
        self._steps = 0
        self._alarms = Alarms(config.health, config.loss.adversarial, config.model.sizes)
        for values in history:
            self._alarms.see(values)

    def add(self, codes: Tensor) -> None:
        """Count the codes [B, H, W, D] of a training step."""
        self._counts.add(codes)

    def observe(self, step: int, values: Mapping[str, Any]) -> Findings:
        """What there is to tell after a step with these metrics (collective)."""
        found = Findings()
        self._steps += 1
        if step % self._every == 0:
            counts = self._counts.take(self._group)
            if self._steps == self._every:  # a window that a restart cut short has fewer codes than the others
                self._tell_use(counts, found)
            self._steps = 0
        warnings = self._alarms.see({**values, **found.values})
        if warnings:
            found.values["warning"] = "; ".join(warnings)
            found.warnings += warnings
        return found

    def _tell_use(self, counts: list[Tensor], found: Findings) -> None:
        """Add the use of each depth's codes, and of a shared codebook's over all depths."""
        uses = [use_of(depth) for depth in counts]
        found.lines.append(
            f"codes over {self._every} steps, by depth: used {' '.join(f'{use.usage:.0%}' for use in uses)} | "
            f"perplexity {' '.join(f'{use.perplexity:.0f}' for use in uses)} | "
            f"dead {' '.join(str(use.dead) for use in uses)}"
        )
        named = {f"_{depth}": use for depth, use in enumerate(uses, 1)}
        charts = [(f"depth {depth}", each) for depth, each in enumerate(counts, 1)]
        if self._shared:
            together = torch.stack(counts).sum(0)
            named[""] = use_of(together)
            charts.append(("all depths", together))
        for suffix, use in named.items():
            found.values |= {f"{name}{suffix}": value for name, value in use._asdict().items()}
        found.charts["code_frequencies"] = frequency_charts(charts)
