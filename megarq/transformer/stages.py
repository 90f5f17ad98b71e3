"""The RQ-Transformer as one list of layers, run in order by the plain model and cut into stages by a pipeline.

Between layers travels a tuple of tensors, the state:

    before body_input               (codes [B, H, W, D], cond [B, L])
    body_input .. body.n            (hidden [B, L+T-1, E], codes)
    head_input .. head.m            (head hidden [B*T, D, E], and with captions their hidden [B, L-1, E])
    after outputs                   (logits [B, H, W, D, K/P], caption logits [B, L-1, V/P] or None), or with targets
                                    the losses of these tokens, [B, H, W, D] and [B, L-1]

Under sequence parallelism the hidden states between the blocks of a stack are this rank's slice [n, E] of their tokens.
A layer's name is the prefix of its parameters' names in every mode.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megarq.config.models import RQTransformerConfig
from megarq.parallel.collectives import join_tokens, split_tokens
from megarq.parallel.initialization import derived_seed
from megarq.parallel.topology import ALONE, TensorGroup
from megarq.transformer.blocks import Block
from megarq.transformer.inputs import BodyInput, FrozenCodebook, HeadInput, LearnedEmbedding
from megarq.transformer.outputs import Outputs
from megarq.transformer.parameters import NamedParameters

State = tuple[Any, ...]
OUTPUTS = "outputs"
"""Name of the last layer."""


@dataclass(frozen=True)
class Layer:
    """One layer of the list."""

    name: str
    """Prefix of its parameters' names."""
    build: Callable[[], nn.Module]
    """Makes the module, its weights uninitialised."""
    apply: Callable[..., State]
    """(module, state) to the next state; the last layer's also takes targets and condition, and gives losses."""


def layer_list(config: RQTransformerConfig, tp: TensorGroup = ALONE, shared_codebook: bool = True) -> list[Layer]:
    """All layers in order. Learned embeddings read by both body and head are one module, built once."""
    tables: dict[str, LearnedEmbedding] = {}

    def codes(source: str) -> FrozenCodebook | LearnedEmbedding:
        if source == "codebook":
            return FrozenCodebook(config.sizes, shared_codebook, config.codebook_dim)
        if source not in tables:
            tables[source] = LearnedEmbedding(config.sizes, config.shared_embedding, config.embed_dim)
        return tables[source]

    lengths = {"body": config.cond_length + config.positions - 1, "head": config.depth}

    def blocks(name: str) -> list[Layer]:
        stack = getattr(config, name)
        build = lambda: Block(config.embed_dim, stack, config.dropout, tp, tokens=lengths[name])  # noqa: E731
        return [Layer(f"{name}.{index}", build, _block) for index in range(stack.layers)]

    def body_input(layer: nn.Module, state: State) -> State:
        codes, cond = state
        return split_tokens(layer(codes.flatten(1, 2), cond), tp), codes

    def head_input(layer: nn.Module, state: State) -> State:
        hidden, codes = state
        hidden = join_tokens(hidden, tp, lengths["body"])
        caption, contexts = hidden.split([lengths["body"] - config.positions, config.positions], dim=1)
        head = split_tokens(layer(contexts, codes.flatten(1, 2)), tp)
        return (head, caption.contiguous()) if config.condition == "text" else (head,)

    def outputs(layer: nn.Module, state: State, targets: Tensor | None = None, cond: Tensor | None = None) -> State:
        head, caption = (*state, None)[:2]
        logits: State = layer(join_tokens(head, tp, lengths["head"]), caption, targets, cond)
        return logits

    return [
        Layer("body_input", lambda: BodyInput(config, codes(config.body_input), tp), body_input),
        *blocks("body"),
        Layer("head_input", lambda: HeadInput(config, codes(config.head_input)), head_input),
        *blocks("head"),
        Layer(OUTPUTS, lambda: Outputs(config, tp), outputs),
    ]


def _block(layer: nn.Module, state: State) -> State:
    hidden, *rest = state
    return layer(hidden), *rest


class Stage(NamedParameters):
    """Consecutive layers of the list under their names: all of them in the plain model, some in a pipeline."""

    body: nn.ModuleDict
    head: nn.ModuleDict

    def __init__(
        self, config: RQTransformerConfig, layers: Sequence[Layer], tp: TensorGroup = ALONE, recompute: bool = False
    ) -> None:
        """`recompute` keeps only the states between blocks for the backward pass, and runs each block again."""
        super().__init__(config, tp)
        self.recompute = recompute
        self.answers: Callable[[], tuple[Tensor, Tensor]] | None = None
        """On a pipeline's last stage: gives the targets and the condition of the micro-batch at hand."""
        self.layers = list(layers)
        stacks = {"body": nn.ModuleDict(), "head": nn.ModuleDict()}
        for layer in self.layers:
            stack, _, index = layer.name.partition(".")
            if index:
                stacks[stack][index] = layer.build()
            self.add_module(stack, stacks[stack] if index else layer.build())
        for name, blocks in stacks.items():
            self.add_module(name, blocks)

    def forward(self, *state: Any) -> Any:
        """What a pipeline calls, with the state as one argument: the next state, or on the last stage the losses.

        All parameters must be used in here: under bf16 DeepSpeed drops the gradients of those used after it.
        """
        if self.answers is None:
            return self.run(*state)
        losses = self.finish(self.run(*state), *self.answers())
        return tuple(loss for loss in losses if loss is not None)

    def run(self, state: State) -> State:
        """Pass the state through all layers but `outputs`.

        In training each block draws its dropout from (the seed in effect, its name): a stage of a pipeline draws what
        the whole model draws.
        """
        seed = torch.initial_seed()
        for layer in self.layers:
            if layer.name == OUTPUTS:
                continue
            built = self.get_submodule(layer.name)
            if not self.training or not isinstance(built, Block):
                state = layer.apply(built, state)
            elif self.recompute:
                state = checkpoint(_seeded, layer, built, state, seed, use_reentrant=False, preserve_rng_state=False)
            else:
                state = _seeded(layer, built, state, seed)
        if self.training:
            torch.manual_seed(seed)
        return state

    def finish(self, state: State, targets: Tensor | None = None, cond: Tensor | None = None) -> State:
        """Logits, or with targets the losses of all tokens: what `outputs` makes of the last state."""
        return self.layers[-1].apply(self.get_submodule(OUTPUTS), state, targets, cond)


def _seeded(layer: Layer, built: nn.Module, state: State, seed: int) -> State:
    torch.manual_seed(derived_seed(seed, layer.name))
    return layer.apply(built, state)
