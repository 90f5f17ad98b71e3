"""Drawing stacks of codes from an RQ-Transformer: the training blocks, one token at a time, against key-value caches.

    read the condition                                  the body reads L tokens; its last output, the context, is h_1
    for t = 1..T:
        for d = 1..D:                                   a fresh head cache for each position
            logits of depth d                           from the context and the codes drawn at t so far
            draw k_td from logits: temperature, then top-k, then top-p
        read the codes drawn at t                       one body token gives h_{t+1}

What is random about a picture is T * D uniform numbers that depend on the seed and the picture's index alone, so a
picture is the same whatever pictures are drawn beside it (as far as the device's products do not depend on the batch).

Shapes: B batch, T = H x W positions, D depth, L condition length, E width, K codebook size, P tensor-parallel size.
"""

import functools
import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megarq.errors import ConfigError
from megarq.inference.settings import Counts, DepthSettings, Shares, check_seed, depth_settings
from megarq.parallel.collectives import gather_from
from megarq.parallel.initialization import named_generator
from megarq.transformer.blocks import Window
from megarq.transformer.rq_transformer import WINDOW_STEP, RQTransformer

Position = int | Tensor
"""A position, or where the device alone knows it, int64 [1]."""
Choose = Callable[[Tensor, Position, int], Tensor]
"""From logits [B, K_d], position and depth to codes [B]."""
Progress = Callable[[int], object]
"""Told, after each position, how many stacks were drawn: the batch size."""


class Guidance(NamedTuple):
    """Classifier-free guidance (arXiv 2207.12598): logits become null + scale * (conditional - null)."""

    scale: float
    """1 leaves the condition's logits as they are, 0 forgets the condition, more than 1 stresses it."""
    null: Tensor
    """The null condition, int64 [L]: the empty caption."""


class Sampler:
    """Draws batches of one size; caches, and on a GPU the captured steps, serve one batch after the other.

    On a GPU the body's step is captured as a CUDA graph for each length of window, and the D steps of the head with
    their draws as one: a picture costs 2 T launches, and nothing waits for the device, but that progress which somebody
    wants to see is told one position late. Elsewhere, and over a tensor group, the same steps run one operation at a
    time.
    """

    def __init__(
        self,
        transformer: RQTransformer,
        batch: int,
        choose: Choose,
        guidance: Guidance | None = None,
        placed: bool | None = None,
    ) -> None:
        """`placed` runs the steps that can be captured; by default on a GPU, where they then are captured."""
        self.transformer = transformer
        self._guidance = guidance
        rows = batch if guidance is None else 2 * batch
        device = transformer.body_input.positions.device
        config = transformer.config
        self._choose = choose
        self._body_caches, self._head_caches = transformer.new_caches(rows)
        self._codes = torch.zeros(batch, config.positions, config.depth, dtype=torch.int64, device=device)
        self._context = transformer.body_input.positions.new_zeros(rows, config.embed_dim)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        on_gpu = device.type == "cuda"
        self._placed = (on_gpu and transformer.tp.size == 1) if placed is None else placed
        self._captured = self._placed and on_gpu
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._passed: deque[torch.cuda.Event] = deque()

    @torch.no_grad()
    def draw(self, cond: Tensor, progress: Progress | None = None) -> Tensor:
        """Stacks [B, H, W, D] for conditions [B, L]. Dropout is off, whatever the model's mode.

        Raises ConfigError where the model's answers are not finite.
        """
        config, device = self.transformer.config, self._place.device
        # Graphs are captured on, and Triton launches on, the current device, which each thread has of its own.
        with _evaluating(self.transformer), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if self._captured and not self._graphs:
                self._capture()
            self._start(cond)
            for position in range(config.positions):
                if position:
                    self._run_body(position - 1)
                self._run_head(position)
                if progress is not None:
                    self._report(progress, position)
        if not self._finite:
            for cache in (*self._body_caches, *self._head_caches):
                cache.clear()
            guided = "" if self._guidance is None else f", or guidance={self._guidance.scale:g} is too much for them"
            raise ConfigError(
                f"the model's hidden states or logits are not finite in {self._context.dtype}: its weights are "
                f"damaged, or too large for float16{guided}. Use dtype bfloat16 or float32."
            )
        return self._codes.unflatten(1, config.code_shape[:2]).clone()

    def _report(self, progress: Progress, position: int) -> None:
        """Tell of this position; on a GPU, which comes to it later, of the one before, once it has passed that."""
        last = position + 1 == self.transformer.config.positions
        if not self._captured:
            progress(len(self._codes))
            return
        passed = torch.cuda.Event()
        passed.record()
        self._passed.append(passed)
        while len(self._passed) > (0 if last else 1):
            self._passed.popleft().synchronize()
            progress(len(self._codes))

    def _start(self, cond: Tensor) -> None:
        """Read the conditions [B, L], each once however many pictures it has, and where guided the null condition."""
        self._place.zero_()
        self._passed.clear()
        if self._guidance is not None:
            cond = torch.cat([cond, self._guidance.null.to(cond).expand_as(cond)])
        cond, rows = cond.unique(dim=0, return_inverse=True)
        hidden = self.transformer.body_input.embed_condition(cond)
        for block, cache in zip(self.transformer.body.values(), self._body_caches, strict=True):
            of_conditions = cache.like(len(cond), cond.shape[1])
            hidden = block(hidden, of_conditions)
            cache.reset()
            cache.append(of_conditions.keys[rows], of_conditions.values[rows])
        self._context.copy_(hidden[rows, -1])
        self._finite.copy_(self._context.isfinite().all())

    def _run_body(self, position: int) -> None:
        """Read the stack drawn at `position`: the context becomes the next position's."""
        length = self._window_length(position)
        if self._captured:
            self._graphs[length].replay()
        elif self._placed:
            self._windowed_step(length)
        else:
            stack = self._with_null(self._codes[:, position : position + 1])
            self._read(self.transformer.body_input.embed_codes(stack, position))

    def _run_head(self, position: int) -> None:
        """Draw the codes of `position`."""
        if self._captured:
            self._graphs[0].replay()
        elif self._placed:
            self._placed_stack()
        else:
            self._codes[:, position] = self._stack(position)

    def _read(self, hidden: Tensor) -> None:
        """Pass tokens [B, S, E] through the body."""
        for block, cache in zip(self.transformer.body.values(), self._body_caches, strict=True):
            hidden = block(hidden, cache)
        self._context.copy_(hidden[:, -1])
        self._finite.logical_and_(self._context.isfinite().all())

    def _stack(self, position: Position) -> Tensor:
        """Draw one stack [B, D] from the context."""
        for cache in self._head_caches:
            cache.reset()
        drawn = self._codes[:, 0, :0]
        for depth in range(self.transformer.config.depth):
            code = self._choose(self._logits(drawn), position, depth)
            drawn = torch.cat([drawn, code.unsqueeze(1)], dim=1)
        return drawn

    def _logits(self, drawn: Tensor) -> Tensor:
        """Logits of depth d, fp32 [B, K_d], given the codes of the position so far [B, d]."""
        model, depth = self.transformer, drawn.shape[-1]
        hidden = model.head_input.embed_step(self._context, self._with_null(drawn))  # [B or 2B, 1, E]
        for block, cache in zip(model.head.values(), self._head_caches, strict=True):
            hidden = block(hidden, cache)
        logits = gather_from(model.outputs.codes(hidden, slice(depth, depth + 1)), model.tp)  # [B, 1, K]
        logits = logits[:, 0, : model.config.sizes[depth]].float()
        if self._guidance is not None:
            conditional, null = logits.chunk(2)
            logits = null + self._guidance.scale * (conditional - null)
        self._finite.logical_and_(logits.isfinite().all())
        return logits

    def _with_null(self, codes: Tensor) -> Tensor:
        """Codes [B, ..] for all rows: guided pictures are read twice, below their condition and below the null one."""
        return codes if self._guidance is None else torch.cat([codes, codes])

    def _window_length(self, position: int) -> int:
        """How much of the caches is read when the stack of `position` is the newest token."""
        tokens = self.transformer.config.cond_length + position + 1
        return -(-tokens // WINDOW_STEP) * WINDOW_STEP

    def _capture(self) -> None:
        """Record the steps as CUDA graphs, under the length of their window; the head's under 0."""
        graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        lengths = {self._window_length(position) for position in range(self.transformer.config.positions - 1)}
        steps = {length: functools.partial(self._windowed_step, length) for length in sorted(lengths)}
        for key, step in ({0: self._placed_stack} | steps).items():
            for _ in range(2):  # before it is captured, what a first call allocates and chooses
                self._place.zero_()
                _on_side_stream(step, self._place.device)
            self._place.zero_()
            graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[key], pool=pool, capture_error_mode="thread_local"):
                step()
        self._graphs = graphs  # all of them, or none where memory ran out

    def _windowed_step(self, length: int) -> None:
        """The body's step at the place that the device knows."""
        place = self._place + self.transformer.config.cond_length
        absent = torch.arange(length, device=place.device) > place
        window = Window(place, self._context.new_zeros(length).masked_fill_(absent, float("-inf")))
        for cache in self._body_caches:
            cache.window = window
        stack = self._with_null(self._codes.index_select(1, self._place)[:, 0])
        self._read(self.transformer.body_input.embed_stack(stack, self._place))
        self._place.add_(1)

    def _placed_stack(self) -> None:
        self._codes.index_copy_(1, self._place, self._stack(self._place).unsqueeze(1))


def _on_side_stream(step: Callable[[], None], device: torch.device) -> None:
    """Run a step as capturing wants its first runs: on a stream of its own."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream(device).wait_stream(stream)


class Draws:
    """Chooses codes by the settings of their depths and by numbers in [0, 1) that the pictures' indices decide."""

    def __init__(self, transformer: RQTransformer, batch: int, settings: Sequence[DepthSettings]) -> None:
        self.settings = list(settings)
        self._shape = (transformer.config.positions, transformer.config.depth)
        device = transformer.body_input.positions.device
        self._uniform = torch.zeros(batch, *self._shape, dtype=torch.float64, device=device)

    def seed(self, seed: int, indices: Sequence[int]) -> None:
        """Draw the numbers of the next batch's pictures."""
        numbers = [
            torch.rand(
                self._shape, generator=named_generator(seed, "picture", index), dtype=torch.float64, device="cpu"
            )
            for index in indices
        ]
        self._uniform.copy_(torch.stack(numbers))

    def __call__(self, logits: Tensor, position: Position, depth: int) -> Tensor:
        """Codes [B] from logits [B, K_d]."""
        numbers = self._uniform[:, :, depth]  # [B, T]
        uniform = numbers[:, position] if isinstance(position, int) else numbers.index_select(1, position)[:, 0]
        return self.settings[depth].draw(logits, uniform)


class CodeSampler:
    """Draws codes for conditions of any number, keeping the sampler of the batch size and settings asked for last."""

    def __init__(self, transformer: RQTransformer, captured: bool = True) -> None:
        """`captured` lets a GPU's steps be captured, once for each batch size and settings."""
        self.transformer = transformer
        self._placed = None if captured else False
        self._kept: tuple[int, list[DepthSettings], float] | None = None
        self._sampler: Sampler | None = None

    def draw(
        self,
        cond: Tensor,
        settings: list[DepthSettings],
        seed: int,
        indices: Sequence[int],
        progress: Progress | None = None,
        guidance: Guidance | None = None,
    ) -> Tensor:
        """Stacks [B, H, W, D] for checked conditions [B, L]."""
        if guidance is not None and guidance.scale == 1:
            guidance = None
        asked = (len(cond), settings, 1.0 if guidance is None else guidance.scale)
        if self._kept != asked:
            self._kept = self._sampler = None  # its memory is free before the next one's is taken
            self._draws = Draws(self.transformer, len(cond), settings)
            self._sampler = Sampler(self.transformer, len(cond), self._draws, guidance, self._placed)
            self._kept = asked
        assert self._sampler is not None
        self._draws.seed(seed, indices)
        return self._sampler.draw(cond, progress)


def sample_codes(
    transformer: RQTransformer,
    cond: Tensor,
    top_k: Counts = None,
    top_p: Shares = 1.0,
    temperature: Shares = 1.0,
    seed: int = 0,
    *,
    indices: Sequence[int] | None = None,
    progress: Progress | None = None,
    guidance: Guidance | None = None,
    captured: bool = True,
) -> Tensor:
    """Draw one stack of codes for each condition.

    Args:
        transformer: with weights and codebook loaded.
        cond: int64 [B, L] caption tokens or [B, 1] classes; zeros [B, 1] where the model has no condition.
        top_k: draw among the k likeliest codes: one value, or one for each depth; None for all.
        top_p: among the likeliest codes that hold this share of the probability: one value, or one for each depth.
        temperature: divides the logits: one value, or one for each depth.
        seed: with a picture's index, all that is random about it.
        indices: the pictures' indices [B]; 0, 1, .. by default.
        progress: called after each position with B.
        guidance: its scale and null condition, for a model of captions.
        captured: whether a GPU's steps are captured; not so where other work of the process is on the GPU as well.

    Returns:
        int64 [B, H, W, D], on the transformer's device.

    Raises:
        ConfigError: a condition or setting that the model cannot take.
    """
    settings = depth_settings(transformer.config.sizes, top_k, top_p, temperature)
    seed = check_seed(seed)
    cond = check_condition(transformer, cond)
    return CodeSampler(transformer, captured).draw(
        cond, settings, seed, check_indices(indices, len(cond)), progress, guidance
    )


def check_condition(transformer: RQTransformer, cond: Tensor) -> Tensor:
    """The condition as int64 [B, L] on the model's device. Raises ConfigError where the model cannot read it."""
    config = transformer.config
    if cond.is_floating_point() or cond.dtype == torch.bool or cond.ndim not in (1, 2) or not len(cond):
        raise ConfigError(
            f"cond is {cond.dtype} {list(cond.shape)}: give whole numbers [B, {config.cond_length}], one row a picture."
        )
    device = transformer.body_input.positions.device
    cond = transformer.fill_condition(cond.to(device, torch.int64), len(cond))
    low, high = int(cond.min()), int(cond.max())
    if low < 0 or high >= config.cond_vocab_size:
        raise ConfigError(
            f"cond holds {low if low < 0 else high}: this model's {config.condition} condition goes from 0 to "
            f"{config.cond_vocab_size - 1}. Give numbers in this range."
        )
    return cond


def check_indices(indices: Sequence[int] | None, count: int) -> list[int]:
    """The indices of so many pictures; 0, 1, .. for None. Raises ConfigError for another number, or other things."""
    if indices is None:
        return list(range(count))
    if len(indices) != count:
        raise ConfigError(f"{len(indices)} indices for {count} conditions: give one for each.")
    try:
        return [operator.index(index) for index in indices]
    except TypeError:
        raise ConfigError(f"indices={list(indices)!r}: give whole numbers.") from None


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
