"""The RQ-Transformer as one list of layers, run in order by the plain model and cut into stages by a pipeline.

Between layers travels a tuple of tensors, the state:

    before body_input               (codes [B, H, W, D], cond [B, L])
    body_input .. body.n            (hidden [B, L+T-1, E], codes)
    head_input .. head.m            (head hidden [B*T, D, E], caption hidden [B, L-1, E], codes)
    after outputs                   (logits [B, H, W, D, K/P], caption logits [B, L-1, V/P] or None)

A layer's name is the prefix of its parameters' names in every mode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megarq.config.models import RQTransformerConfig
from megarq.parallel.topology import ALONE, TensorGroup
from megarq.transformer.blocks import Block
from megarq.transformer.inputs import BodyInput, FrozenCodebook, HeadInput, LearnedEmbedding
from megarq.transformer.outputs import Outputs

State = tuple[Any, ...]


@dataclass(frozen=True)
class Layer:
    """One layer: its name, how to build it, and what it does to the state."""

    name: str
    build: Callable[[], nn.Module]
    apply: Callable[[nn.Module, State], State]


def layer_list(config: RQTransformerConfig, tp: TensorGroup = ALONE, shared_codebook: bool = True) -> list[Layer]:
    """All layers in order. Learned embeddings read by both body and head are one module, built once."""
    tables: dict[str, LearnedEmbedding] = {}

    def codes(source: str) -> FrozenCodebook | LearnedEmbedding:
        if source == "codebook":
            return FrozenCodebook(config.sizes, shared_codebook, config.codebook_dim)
        if source not in tables:
            tables[source] = LearnedEmbedding(config.sizes, config.shared_embedding, config.embed_dim)
        return tables[source]

    def blocks(name: str) -> list[Layer]:
        stack = getattr(config, name)
        build = lambda: Block(config.embed_dim, stack, config.dropout, tp)  # noqa: E731
        return [Layer(f"{name}.{index}", build, _block) for index in range(stack.layers)]

    return [
        Layer("body_input", lambda: BodyInput(config, codes(config.body_input), tp), _body_input),
        *blocks("body"),
        Layer("head_input", lambda: HeadInput(config, codes(config.head_input)), _head_input),
        *blocks("head"),
        Layer("outputs", lambda: Outputs(config, tp), _outputs),
    ]


def _body_input(layer: nn.Module, state: State) -> State:
    codes, cond = state
    return layer(codes.flatten(1, 2), cond), codes


def _block(layer: nn.Module, state: State) -> State:
    hidden, *rest = state
    return layer(hidden), *rest


def _head_input(layer: nn.Module, state: State) -> State:
    hidden, codes = state
    positions = codes.shape[1] * codes.shape[2]
    caption, contexts = hidden.split([hidden.shape[1] - positions, positions], dim=1)
    return layer(contexts, codes.flatten(1, 2)), caption, codes


def _outputs(layer: nn.Module, state: State) -> State:
    head, caption, _ = state
    logits: tuple[Tensor, Tensor | None] = layer(head, caption)
    return logits
