"""Layers and the whole model cut over 2 and 4 ranks equal the uncut ones, forward and backward.

"Uncut" is torch's own operation for collectives, layers and cross-entropy, and the model with tp=1 for the model.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cut_layers import SIZES, SplitQKV, check, check_gradients, check_layer, filled, normal, own, tensor_group, uncut
from torch import Tensor, nn
from torch.distributed import get_world_size

from megarq.config.models import RQTransformerConfig, StackConfig
from megarq.config.run import ObjectiveConfig
from megarq.errors import ConfigError
from megarq.parallel.collectives import copy_to, gather_from, reduce_from
from megarq.parallel.cross_entropy import cross_entropy
from megarq.parallel.layers import (
    ColumnParallelLinear,
    DepthParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megarq.parallel.topology import TensorGroup
from megarq.transformer.loss import objective
from megarq.transformer.rq_transformer import RQTransformer

TEXT = RQTransformerConfig(
    code_shape=[2, 2, 3],
    codebook_size=16,
    codebook_dim=8,
    embed_dim=32,
    body=StackConfig(layers=2, heads=4),
    head=StackConfig(layers=2, heads=4),
    cond_length=5,
    cond_vocab_size=12,
    dropout=0.0,
)
PLAIN_STACK = StackConfig(layers=1, heads=4, gelu="sigmoid", attention_bias=False, mlp_bias=False)
MODELS = {
    "captions": TEXT,
    "captions, dropout": replace(TEXT, dropout=0.3),
    "classes": replace(TEXT, cond_length=1, cond_vocab_size=7),
    "unconditional": replace(TEXT, cond_length=1, cond_vocab_size=1),
    "learned embeddings": replace(TEXT, body_input="learned", head_input="learned"),
    "learned body, separate depths": replace(TEXT, body_input="learned", cumulative_depth=False),
    "tables per depth": replace(
        TEXT,
        codebook_sizes=[16, 12, 4],
        body_input="learned",
        head_input="learned",
        shared_embedding=False,
        shared_classifier=False,
    ),
    "no biases, sigmoid gelu": replace(TEXT, body=PLAIN_STACK, head=PLAIN_STACK),
    "depth 1 without head": replace(TEXT, code_shape=[2, 2, 1], head=replace(TEXT.head, layers=0)),
}


def check_collectives() -> None:
    tp, size = tensor_group(), get_world_size()
    parts = [normal(3, 8, seed=rank) for rank in range(size)]  # a different tensor on each rank
    upstream = [normal(3, 8, seed=10 + rank) for rank in range(size)]

    x = parts[0].clone().requires_grad_()
    copy_to(x, tp).backward(upstream[tp.rank])
    check(x.grad, sum(upstream[1:], upstream[0]), "copy_to sums gradients")

    x = parts[tp.rank].clone().requires_grad_()
    y = reduce_from(x, tp)
    y.backward(upstream[0])
    check(y, sum(parts[1:], parts[0]), "reduce_from sums")
    check(x.grad, upstream[0], "reduce_from passes gradients on")

    x = parts[tp.rank].clone().requires_grad_()
    y = gather_from(x, tp)
    y.backward(torch.cat(upstream, -1))
    check(y, torch.cat(parts, -1), "gather_from joins")
    check(x.grad, upstream[tp.rank], "gather_from gives each rank its gradient")


class LinearPerDepth(nn.Module):
    """A torch Linear for each depth with DepthParallelLinear's parameters."""

    def __init__(self, depth: int, width: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(depth, out, width)), nn.Parameter(torch.empty(depth, out))

    def forward(self, x: Tensor) -> Tensor:
        depths = range(len(self.weight))
        return torch.stack([F.linear(x[..., d, :], self.weight[d], self.bias[d]) for d in depths], dim=-2)


def check_column_linear() -> None:
    check_layer(ColumnParallelLinear(6, 8, tp=tensor_group()), nn.Linear(6, 8), normal(3, 6))


def check_row_linear() -> None:
    cut = RowParallelLinear(8, 6, tp=tensor_group())
    check_layer(cut, nn.Linear(8, 6), normal(3, 8), cut_input=own, cut_output=uncut)


def check_qkv_linear() -> None:
    check_layer(QKVParallelLinear(8, tp=tensor_group()), SplitQKV(8), normal(3, 8))


def check_depth_linear() -> None:
    check_layer(DepthParallelLinear(3, 6, 8, tensor_group()), LinearPerDepth(3, 6, 8), normal(2, 3, 6))


def check_depth_linear_of_some_depths() -> None:
    cut, whole = DepthParallelLinear(3, 6, 8, tensor_group()), LinearPerDepth(3, 6, 8)
    filled(cut, tensor_group()), filled(whole, TensorGroup())
    x = normal(2, 3, 6)
    check(cut(x[:, 1:2], slice(1, 2)), own(whole(x)[:, 1:2]))


def check_vocab_embedding() -> None:
    cut, whole = VocabParallelEmbedding(8, 6, tensor_group()), nn.Embedding(8, 6)
    filled(cut, tensor_group()), filled(whole, TensorGroup())
    tokens = torch.tensor([[0, 7, 3], [3, 4, 7]])
    ours, theirs = cut(tokens), whole(tokens)
    check(ours, theirs)
    for y in (ours, theirs):
        (y * normal(2, 3, 6)).sum().backward()
    check_gradients(cut, whole)


def check_cross_entropy(soft: bool, scale: float) -> None:
    """Against torch, with a different weight on each token; `scale` makes logits whose exponentials overflow."""
    whole = (normal(5, 3, 16) * scale).requires_grad_()
    cut = own(whole.detach()).clone().requires_grad_()
    weights = normal(5, 3, seed=1)
    if soft:
        targets = normal(5, 3, 16, seed=2).softmax(-1)
        expected = -(targets * whole.log_softmax(-1)).sum(-1)
        loss = cross_entropy(cut, own(targets), tensor_group())
    else:
        targets = torch.arange(15).reshape(5, 3)
        expected = F.cross_entropy(whole.flatten(0, 1), targets.flatten(), reduction="none").view(5, 3)
        loss = cross_entropy(cut, targets, tensor_group())
    check(loss, expected, "loss")
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    check(cut.grad, own(whole.grad), "gradient")


def check_bf16_cross_entropy() -> None:
    """bf16 logits give an fp32 loss and a bf16 gradient."""
    whole = normal(5, 16).bfloat16()
    cut = own(whole).clone().requires_grad_()
    loss = cross_entropy(cut, torch.arange(5), tensor_group())
    check(loss, F.cross_entropy(whole.float(), torch.arange(5), reduction="none"))
    loss.sum().backward()
    assert cut.grad is not None and cut.grad.dtype == torch.bfloat16


def loss_and_model(
    config: RQTransformerConfig, tp: TensorGroup, soft: bool, recompute: bool
) -> tuple[Tensor, Tensor, Tensor | None, RQTransformer]:
    """Loss after forward and backward, and whole logits."""
    model = RQTransformer(config, tp, activation_checkpointing=recompute)
    model.initialize(seed=4)
    if config.uses_codebook:
        model.load_codebook(normal(config.codebook_size, config.codebook_dim))
    generator = torch.Generator().manual_seed(3)
    shape = (3, *config.code_shape)
    codes = torch.stack([torch.randint(size, shape[:-1], generator=generator) for size in config.sizes], dim=-1)
    cond = torch.randint(config.cond_vocab_size, (3, config.cond_length), generator=generator)
    targets = codes
    if soft:
        whole = normal(*shape, max(config.sizes), seed=5).mul(2).softmax(-1)
        targets = whole.chunk(tp.size, dim=-1)[tp.rank]
    torch.manual_seed(6)
    terms = objective(*model(codes, cond, targets), cond, ObjectiveConfig())
    terms.total.backward()
    with torch.no_grad():
        logits, caption_logits = model(codes, cond)
    caption = None if caption_logits is None else gather_from(caption_logits, tp).detach()
    return terms.total.detach(), gather_from(logits, tp).detach(), caption, model


def check_model(config: RQTransformerConfig, soft: bool, recompute: bool = False) -> None:
    cut_loss, cut_logits, cut_caption, cut = loss_and_model(config, tensor_group(), soft, recompute)
    loss, logits, caption, whole = loss_and_model(config, TensorGroup(), soft, recompute)
    check(cut_loss, loss, "loss")
    check(cut_logits, logits, "logits")
    if caption is not None:
        check(cut_caption, caption, "caption logits")
    check_gradients(cut, whole)


def check_initial_weights(config: RQTransformerConfig) -> None:
    tp = tensor_group()
    cut, whole = RQTransformer(config, tp), RQTransformer(config)
    cut.initialize(seed=4), whole.initialize(seed=4)
    for name, parameter in cut.named_parameters():
        dim = getattr(parameter, "partition_dim", None)
        expected = whole.get_parameter(name)
        assert torch.equal(parameter, expected if dim is None else own(expected, dim)), name


def message_of_indivisible_heads() -> str:
    try:
        RQTransformer(replace(TEXT, body=replace(TEXT.body, heads=1)), tensor_group())
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("size", SIZES)
def test_collectives_and_their_gradients(rank_group, size):
    rank_group(size).run(check_collectives)


LAYERS = [
    check_column_linear,
    check_row_linear,
    check_qkv_linear,
    check_depth_linear,
    check_depth_linear_of_some_depths,
    check_vocab_embedding,
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__.removeprefix("check_"))
def test_layer_equals_torch(rank_group, layer, size):
    rank_group(size).run(layer)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["ordinary", "huge"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_cross_entropy_equals_torch(rank_group, soft, scale, size):
    rank_group(size).run(check_cross_entropy, soft, scale)


@pytest.mark.parametrize("size", SIZES)
def test_cross_entropy_of_bf16_logits_is_fp32(rank_group, size):
    rank_group(size).run(check_bf16_cross_entropy)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_initial_weights_are_slices_of_the_uncut_models(rank_group, name, size):
    rank_group(size).run(check_initial_weights, MODELS[name])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("name", MODELS)
def test_model_equals_the_uncut_model(rank_group, name, soft, size):
    rank_group(size).run(check_model, MODELS[name], soft)


@pytest.mark.parametrize("size", SIZES)
def test_model_with_recomputed_activations_equals_the_uncut_model(rank_group, size):
    rank_group(size).run(check_model, MODELS["captions, dropout"], False, True)


def test_heads_that_tp_does_not_divide_are_refused(rank_group):
    assert (
        rank_group(2).run(message_of_indivisible_heads)
        == ["1 attention heads over parallel.tp=2: choose a tp that divides them."] * 2
    )
