"""Bytes that a rank sends in an optimiser step, by kind, and the bandwidth they have.

In a ring of n ranks each sends (n - 1) / n of a tensor for an all-gather or a reduce-scatter, and twice that for an
all-reduce, which is one after the other. With S numbers of fp32 gradients and of parameters on a rank:

    ZeRO-1    one all-reduce of gradients, one all-gather of updated parameters
    ZeRO-2    an all-reduce of gradients in every micro-batch, one all-gather of updated parameters
    ZeRO-3    in every micro-batch a reduce-scatter of gradients, and an all-gather of parameters forward, one
              backward, and one more for the blocks where their activations are recomputed

ZeRO-1 and 2 need only a reduce-scatter, but DeepSpeed sums whole buckets on all ranks and keeps its own part.

Legend: N tokens of a micro-batch, E width, L condition length, P tensor-parallel size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megarq.config.run import RQTransformerRunConfig
from megarq.planning.activations import received_bytes, sent_bytes
from megarq.planning.flops import transformer_tokens
from megarq.planning.layout import Layout

GRADIENT = 4
"""Bytes of a gradient on the wire: communication_data_type is fp32 in every shipped configuration."""


@dataclass(frozen=True)
class Links:
    """Bandwidth in bytes per second that one GPU can send with; GPUs of a node are neighbouring ranks."""

    inside: float
    """To GPUs of its node."""
    between: float
    """To GPUs of other nodes: its share of the node's network."""
    gpus_per_node: int
    """GPUs in a node."""

    def data(self, layout: Layout) -> float:
        """Of a data-parallel ring. One through k ranks of each node can use the network of all k."""
        if layout.tp * layout.dp <= self.gpus_per_node:
            return self.inside
        return min(self.inside, self.between * max(1, self.gpus_per_node // layout.tp))

    def pipeline(self, layout: Layout) -> float:
        """Between stages; the slowest pair counts."""
        return self.inside if layout.world <= self.gpus_per_node else self.between


@dataclass(frozen=True)
class TensorTraffic:
    """What one rank of a tensor group sends for one micro-batch, in bytes."""

    exposed: int
    """While nothing can be computed: all of the forward passes, and what begins a backward pass."""
    hidden: int
    """While gradients of weights are computed."""


def gradient_bytes(layout: Layout, parameters: int) -> int:
    """A step's reduction of gradients, for a rank that computes those of so many parameters."""
    halves = 1 if layout.zero == 3 else 2
    times = 1 if layout.zero == 1 else layout.accumulation
    return times * halves * _ring(parameters * GRADIENT, layout.dp)


def parameter_bytes(layout: Layout, parameters: int, in_blocks: int) -> int:
    """A step's all-gathers of parameters, of which `in_blocks` belong to blocks."""
    whole = parameters * layout.bytes_each
    if layout.zero < 3:
        return _ring(whole, layout.dp)
    again = in_blocks * layout.bytes_each if layout.activation_checkpointing else 0
    return layout.accumulation * _ring(2 * whole + again, layout.dp)


def tensor_traffic(config: RQTransformerRunConfig, layout: Layout, stage: Sequence[str]) -> TensorTraffic:
    """All-reduces of a stage's blocks and ends, counted in halves: all-gathers and reduce-scatters of N x E numbers.

    A block has two pairs of a column and a row layer. Forward each pair takes two halves: one all-reduce, or with
    sequence parallelism a gather and a scatter. Backward it takes two beside the weights' gradients: an all-reduce, or
    a scatter and the input's gather; and with sequence parallelism the gather of its output's gradient before.
    Recomputation repeats the forward halves up to the last number saved: without dropout, that is before the second
    row layer's sum.
    """
    if layout.tp == 1:
        return TensorTraffic(0, 0)
    model, sequence = config.model, int(layout.sequence)
    tokens = {stack: layout.micro_batch * count for stack, count in transformer_tokens(model).items()}
    words = layout.micro_batch * model.cond_length if model.condition == "text" else 0
    again = (4 - (0 if model.dropout else 2 - sequence)) if layout.activation_checkpointing else 0
    exposed = hidden = 0
    for name in stage:
        stack = name.partition(".")[0]
        if stack in tokens:
            exposed += (4 + 2 * sequence + again) * tokens[stack]
            hidden += 4 * tokens[stack]
        elif name == "body_input":  # the sum of embeddings; the gradients of slices are joined
            exposed += 2 * words + sequence * tokens["body"]
        elif name == "head_input":  # slices of the body are joined, gradients of the head's
            exposed += sequence * (tokens["body"] + tokens["head"])
        else:  # slices of the head are joined; gradients of the classifiers' inputs
            exposed += sequence * tokens["head"]
            hidden += 2 * (tokens["head"] + max(0, words - layout.micro_batch))
    half = model.embed_dim * layout.bytes_each
    return TensorTraffic(_ring(exposed * half, layout.tp), _ring(hidden * half, layout.tp))


def pipeline_bytes(config: RQTransformerRunConfig, layout: Layout, stage: Sequence[str]) -> int:
    """What a stage sends for one micro-batch: states to the next stage, gradients to the one before."""
    return sent_bytes(config, layout, stage) + received_bytes(config, layout, stage)


def _ring(total: int, ranks: int) -> int:
    """What each of the ranks of a ring sends to gather, or to sum and scatter, a tensor of so many bytes."""
    return total * (ranks - 1) // ranks
