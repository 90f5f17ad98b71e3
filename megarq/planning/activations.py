"""Bytes of activations on a rank, by formula: what the forward pass saves, and what the backward pass adds.

A block of N tokens saves, in numbers of the training precision (E width, P tensor-parallel size):

    inputs of both norms, and their outputs (the inputs of qkv and of up)       4 E N
    q, k, v and the attention's output                                          4 E N / P
    input and output of the GELU ("sigmoid" keeps the sigmoid too)              8 E N / P   (12 E N / P)

and besides two fp32 statistics per token and norm, an fp32 log-sum-exp per token and head, and the masks of both
dropouts. Flash attention saves no matrix of tokens by tokens. Under sequence parallelism the first row and the masks
are of a slice of ceil(N / P) tokens. With recomputation a block saves its input alone. Logits are saved only where all
of a batch's fit into `LOGITS_AT_ONCE`; else the loss saves its inputs and computes them again, a part at a time.

Legend: B samples, T positions, D depth, L condition length, E width, K codebook size, V caption vocabulary, P
tensor-parallel size.
"""

from collections.abc import Sequence
from math import ceil

from megarq.config.models import StackConfig
from megarq.config.run import RQTransformerRunConfig
from megarq.planning.flops import transformer_tokens
from megarq.planning.layout import Layout
from megarq.transformer.outputs import LOGITS_AT_ONCE

FP32, INT64 = 4, 8
STATISTICS = 2 * FP32
"""Bytes that LayerNorm saves for a token: mean and reciprocal deviation."""
MASK = 1
"""Bytes of a number in a dropout mask on a GPU; a CPU saves it in the training precision."""


def activation_bytes(config: RQTransformerRunConfig, layout: Layout, stage: Sequence[str], mask: int = MASK) -> int:
    """What a rank keeps of one micro-batch from its forward to its backward pass.

    Args:
        config: the run's.
        layout: how it is cut.
        stage: names of the rank's layers: `Shard.layers`.
        mask: bytes of a number in a dropout mask, see MASK.
    """
    model, each, rows = config.model, layout.bytes_each, layout.micro_batch
    tokens = transformer_tokens(model)
    kept = 0
    for name in stage:
        stack = name.partition(".")[0]
        if name == "body_input":  # codebook vectors before their projection, for T - 1 positions
            projected = model.codebook_dim if model.body_input == "codebook" else 0
            kept += rows * (model.positions - 1) * model.depth * projected * each
        elif name == "head_input":  # the same for D - 1 depths
            projected = model.codebook_dim if model.head_input == "codebook" else 0
            kept += rows * model.positions * (model.depth - 1) * projected * each
        elif name == "outputs":
            kept += _loss_bytes(config, layout)
        elif layout.activation_checkpointing:
            kept += _slice(rows * tokens[stack], layout) * model.embed_dim * each
        else:
            kept += _block_bytes(config, layout, stack, mask)
    return kept + sent_bytes(config, layout, stage)  # DeepSpeed holds what was sent until its gradient arrives


def sent_bytes(config: RQTransformerRunConfig, layout: Layout, stage: Sequence[str]) -> int:
    """States that a stage sends to the next one for one micro-batch; codes, as integers, are left out."""
    return 0 if stage[-1] == "outputs" else _state_bytes(config, layout, stage[-1].startswith("body"))


def received_bytes(config: RQTransformerRunConfig, layout: Layout, stage: Sequence[str]) -> int:
    """States that a stage is sent for one micro-batch, and sends gradients of."""
    return 0 if stage[0] == "body_input" else _state_bytes(config, layout, stage[0].startswith(("body.", "head_input")))


def working_bytes(config: RQTransformerRunConfig, layout: Layout, stage: Sequence[str]) -> int:
    """Most that the backward pass of a stage needs for a moment besides: in a block, or in the loss.

    A block: the gradients of its output and of the MLP's hidden states (with sequence parallelism a gathered input
    too), and what it computes again. The loss: gradients of a part's logits, in fp32 and then cast; computed again are
    their softmax, and what the classifier's norm gives for them, with its gradient.
    """
    model, each = config.model, layout.bytes_each
    tokens = transformer_tokens(model)
    most = 0
    for stack in {name.partition(".")[0] for name in stage} & {"body", "head"}:
        count = layout.micro_batch * tokens[stack]
        gradients = (1 + layout.sequence + 4 / layout.tp) * count * model.embed_dim * each
        again = _block_bytes(config, layout, stack, MASK) - _slice(count, layout) * model.embed_dim * each
        most = max(most, int(gradients) + (again if layout.activation_checkpointing else 0))
    if "outputs" in stage:
        cast = each if each < FP32 else 0
        for count, vocabulary in _classified(config, layout):
            logits, in_parts = min(LOGITS_AT_ONCE, count * vocabulary), count * vocabulary > LOGITS_AT_ONCE
            recomputed = logits * FP32 + 2 * logits // vocabulary * model.embed_dim * each if in_parts else 0
            most = max(most, logits * (FP32 + cast) + recomputed)
    return most


def held_micro_batches(layout: Layout, index: int) -> int:
    """Micro-batches whose activations stage `index` holds at once: 1F1B runs pp - index forward passes ahead."""
    return min(layout.pp - index, layout.accumulation)


def loss_in_parts(config: RQTransformerRunConfig, layout: Layout) -> bool:
    """Whether the image loss computes its logits in parts, and again in the backward pass."""
    tokens, vocabulary = _classified(config, layout)[0]
    return tokens * vocabulary > LOGITS_AT_ONCE


def _slice(tokens: int, layout: Layout) -> int:
    """Tokens between cut layers on one rank."""
    return ceil(tokens / layout.tp) if layout.sequence else tokens


def _state_bytes(config: RQTransformerRunConfig, layout: Layout, body: bool) -> int:
    """Hidden states of the body, or of the head and with them the caption's."""
    count = layout.micro_batch * transformer_tokens(config.model)["body" if body else "head"]
    states = _slice(count, layout)
    if not body and config.model.condition == "text":
        states += layout.micro_batch * (config.model.cond_length - 1)
    return states * config.model.embed_dim * layout.bytes_each


def _block_bytes(config: RQTransformerRunConfig, layout: Layout, name: str, mask: int) -> int:
    model, each = config.model, layout.bytes_each
    stack: StackConfig = getattr(model, name)
    tokens = layout.micro_batch * transformer_tokens(model)[name]
    masks = 2 * model.embed_dim * (MASK if layout.sequence else mask) if model.dropout else 0
    between = _slice(tokens, layout) * (4 * model.embed_dim * each + 2 * STATISTICS + masks)
    inside = (12 if stack.gelu == "exact" else 16) * model.embed_dim * each + stack.heads * FP32
    return between + tokens * inside // layout.tp


def _classified(config: RQTransformerRunConfig, layout: Layout) -> list[tuple[int, int]]:
    """(tokens, this rank's share of the vocabulary) of both classifiers, for one micro-batch."""
    model, rows = config.model, layout.micro_batch
    both = [(rows * model.positions * model.depth, max(model.sizes) // layout.tp)]
    if model.condition == "text":
        both.append((rows * (model.cond_length - 1), model.cond_vocab_size // layout.tp))
    return both


def _loss_bytes(config: RQTransformerRunConfig, layout: Layout) -> int:
    """States before both classifiers, and targets; whole logits add a norm's statistics and output, and a softmax."""
    model, each = config.model, layout.bytes_each
    kept = 0
    for index, (tokens, vocabulary) in enumerate(_classified(config, layout)):
        soft = index == 0 and config.objective.targets == "soft"
        kept += tokens * (model.embed_dim * each + (vocabulary * FP32 if soft else INT64))
        if tokens * vocabulary <= LOGITS_AT_ONCE:
            kept += tokens * (STATISTICS + model.embed_dim * each + vocabulary * FP32)
    return kept
