"""Sequence parallelism over 2 and 4 ranks equals one rank, forward and backward; and collectives overlap products.

B=3 sequences of S=5 tokens of width E: 2 and 4 ranks do not divide the 15 tokens, so the last one's end in padding.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from cut_layers import (
    SIZES,
    SplitQKV,
    check,
    check_gradients,
    check_layer,
    filled,
    normal,
    own,
    own_tokens,
    tensor_group,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megarq.config.models import RQTransformerConfig, StackConfig
from megarq.parallel.collectives import join_tokens, scatter_tokens, split_tokens
from megarq.parallel.layers import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from megarq.parallel.topology import ALONE
from megarq.transformer.blocks import Block, KeyValueCache
from megarq.transformer.rq_transformer import RQTransformer

B, S, E = 3, 5, 32
STACK = StackConfig(layers=1, heads=4)
BARE_STACK = StackConfig(layers=1, heads=4, gelu="sigmoid", attention_bias=False, mlp_bias=False)
TEXT = RQTransformerConfig(
    code_shape=[2, 2, 3],
    codebook_size=16,
    codebook_dim=8,
    embed_dim=E,
    body=StackConfig(layers=2, heads=4),
    head=StackConfig(layers=2, heads=4),
    cond_length=5,
    cond_vocab_size=12,
    dropout=0.3,
)
MODELS = {
    "captions": TEXT,
    "classes": replace(TEXT, cond_length=1),
    "depth 1 without head": replace(TEXT, code_shape=[2, 2, 1], head=replace(TEXT.head, layers=0)),
}


def check_split_tokens() -> None:
    x, upstream = normal(B, S, 4).requires_grad_(), normal(B, S, 4, seed=1)
    y = split_tokens(x, tensor_group(True))
    y.backward(own_tokens(upstream))
    check(y, own_tokens(x.detach()), "own slice")
    check(x.grad, upstream, "joined gradients")


def check_join_tokens() -> None:
    whole, upstream = normal(B, S, 4), normal(B, S, 4, seed=1)
    x = own_tokens(whole).requires_grad_()
    y = join_tokens(x, tensor_group(True), S)
    y.backward(upstream)
    check(y, whole, "joined slices")
    check(x.grad, own_tokens(upstream), "own gradient")


def check_scatter_tokens() -> None:
    tp = tensor_group(True)
    parts, upstream = [normal(B, S, 4, seed=1 + rank) for rank in range(tp.size)], normal(B, S, 4)
    x = parts[tp.rank].clone().requires_grad_()
    y = scatter_tokens(x, tp)
    y.backward(own_tokens(upstream))
    check(y, own_tokens(sum(parts[1:], parts[0])), "own slice of the sum")
    check(x.grad, upstream, "joined gradients")


def check_column_linear() -> None:
    cut = ColumnParallelLinear(6, 8, tp=tensor_group(True))
    check_layer(cut, nn.Linear(6, 8), normal(B, S, 6), cut_input=own_tokens, tokens=S)


def check_row_linear() -> None:
    cut = RowParallelLinear(8, 6, tp=tensor_group(True))
    check_layer(cut, nn.Linear(8, 6), normal(B, S, 8), cut_input=own, cut_output=own_tokens, tokens=S)


def check_qkv_linear() -> None:
    check_layer(QKVParallelLinear(8, tp=tensor_group(True)), SplitQKV(8), normal(B, S, 8), own_tokens, tokens=S)


def check_frozen_weights() -> None:
    """The input's gradient, where no other is asked for."""
    cut = filled(ColumnParallelLinear(6, 8, tp=tensor_group(True)), tensor_group()).requires_grad_(False)
    whole = filled(nn.Linear(6, 8), ALONE)
    ours, theirs = own_tokens(normal(B, S, 6)).requires_grad_(), normal(B, S, 6).requires_grad_()
    cut(ours, S).backward(own(normal(B, S, 8, seed=1)))
    whole(theirs).backward(normal(B, S, 8, seed=1))
    check(ours.grad, own_tokens(theirs.grad))
    assert cut.weight.grad is None


def check_bf16_column_linear(sequence: bool) -> None:
    """Every gradient is bf16 and near fp32's."""
    cut = filled(ColumnParallelLinear(64, 8, tp=tensor_group(sequence)), tensor_group()).bfloat16()
    whole = filled(nn.Linear(64, 8), ALONE)
    x, upstream = normal(B, S, 64), normal(B, S, 8, seed=1)
    theirs = x.clone().requires_grad_()
    whole(theirs).backward(upstream)
    ours = (own_tokens(x) if sequence else x).bfloat16().requires_grad_()
    cut(ours, S if sequence else 0).backward(own(upstream).bfloat16())
    expected = own_tokens(theirs.grad) if sequence else theirs.grad
    for actual, reference in ((ours.grad, expected), (cut.weight.grad, own(whole.weight.grad, 0))):
        assert actual is not None and actual.dtype == torch.bfloat16
        assert (actual.float() - reference).norm() < 0.01 * reference.norm()


def trained_block(block: Block, x: Tensor, recompute: bool) -> tuple[Tensor, Tensor | None]:
    """Output of all tokens and the input's gradient, with dropout; parameters have their gradients afterwards."""
    x = x.clone().requires_grad_()

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(6)
        return join_tokens(block(split_tokens(x, block.dropout.tp)), block.dropout.tp, S)

    y = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False) if recompute else run(x)
    y.backward(normal(*y.shape, seed=7))
    return y.detach(), x.grad


def check_block(stack: StackConfig, dropout: float, recompute: bool) -> None:
    cut, whole = Block(E, stack, dropout, tensor_group(True), tokens=S), Block(E, stack, dropout)
    filled(cut, tensor_group()), filled(whole, ALONE)
    ours, theirs = trained_block(cut, normal(B, S, E), recompute), trained_block(whole, normal(B, S, E), False)
    for what, actual, expected in zip(("output", "input's gradient"), ours, theirs, strict=True):
        assert actual is not None and expected is not None
        assert (actual - expected).norm() < 1e-5 * expected.norm(), what
    scale = max(float(p.grad.abs().max()) for p in whole.parameters() if p.grad is not None)
    for parameter in (*cut.parameters(), *whole.parameters()):
        assert parameter.grad is not None
        parameter.grad /= scale  # `check` allows 1e-6 of the largest
    check_gradients(cut, whole)


def check_cached_block() -> None:
    """Tokens that come one at a time are whole on every rank."""
    tp = tensor_group(True)
    cut, whole = Block(E, STACK, 0.3, tp, tokens=S).eval(), Block(E, STACK, 0.3).eval()
    filled(cut, tp), filled(whole, ALONE)
    x = normal(B, S, E)
    cache = KeyValueCache((B, 4 // tp.size, S, E // 4), x.device, x.dtype)
    with torch.no_grad():
        steps = [cut(x[:, :2], cache), *(cut(x[:, step : step + 1], cache) for step in range(2, S))]
        expected = whole(x)
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-4)
        parallel = join_tokens(cut(split_tokens(x, tp)), tp, S)
        torch.testing.assert_close(parallel, expected, rtol=1e-4, atol=1e-4)


def trained_model(config: RQTransformerConfig, sequence: bool, recompute: bool) -> tuple[Tensor, RQTransformer]:
    model = RQTransformer(config, tensor_group(sequence), activation_checkpointing=recompute)
    model.initialize(seed=4)
    model.load_codebook(normal(config.codebook_size, config.codebook_dim))
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(config.codebook_size, (B, *config.code_shape), generator=generator)
    cond = torch.randint(config.cond_vocab_size, (B, config.cond_length), generator=generator)
    torch.manual_seed(6)
    image, caption = model(codes, cond, codes)
    loss = image.mean() + (caption.mean() if caption is not None else 0)
    loss.backward()
    return loss.detach(), model


def check_model(config: RQTransformerConfig, recompute: bool) -> None:
    """Against the same cut without sequence parallelism, itself compared with the uncut model elsewhere."""
    (loss, cut), (expected, plain) = trained_model(config, True, recompute), trained_model(config, False, False)
    check(loss, expected, "loss")
    for (name, ours), theirs in zip(cut.named_parameters(), plain.parameters(), strict=True):
        check(ours.grad, theirs.grad, f"gradient of {name}")


def kept_bytes(sequence: bool) -> int:
    """What a block keeps for its backward pass, without its parameters."""
    block = filled(Block(E, STACK, 0.3, tensor_group(sequence), tokens=S), tensor_group())
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return saved

    x = normal(16, S, E).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        block(split_tokens(x, tensor_group(sequence)))
    return sum(storage.nbytes() for storage in kept.values())


class Recorder(TorchDispatchMode):
    """Notes products of matrices, and where collectives start and are waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.events.append(f"product {list(result.shape)}")
        return result

    def watched(self, name: str) -> Any:
        """A patch of torch.distributed's collective `name`."""
        collective = getattr(dist, name)

        def start(*args: Any, **kwargs: Any) -> Any:
            assert kwargs["async_op"]
            self.events.append(f"{name} starts")
            return Watched(collective(*args, **kwargs), name, self.events)

        return patch.object(dist, name, start)


class Watched:
    """A started collective that notes when it is waited for."""

    def __init__(self, work: Any, name: str, events: list[str]) -> None:
        self.work, self.name, self.events = work, name, events

    def wait(self) -> None:
        self.events.append(f"{self.name} is waited for")
        self.work.wait()


def backward_events(sequence: bool, qkv: bool) -> list[str]:
    """In order, what the backward pass of a layer from 6 (or 8) features to 8 (or 3 x 8) does."""
    tp = tensor_group(sequence)
    layer = filled(QKVParallelLinear(8, tp=tp) if qkv else ColumnParallelLinear(6, 8, tp=tp), tp)
    x = normal(B, S, 8 if qkv else 6)
    y = layer((own_tokens(x) if sequence else x).requires_grad_(), S if sequence else 0)
    with Recorder() as recorder, ExitStack() as patches:
        for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
            patches.enter_context(recorder.watched(name))
        (torch.cat(y, dim=-1) if qkv else y).sum().backward()
    return recorder.events


COLLECTIVES = [check_split_tokens, check_join_tokens, check_scatter_tokens]
LAYERS = [check_column_linear, check_row_linear, check_qkv_linear]


def name_of(work: Callable[..., Any]) -> str:
    return work.__name__.removeprefix("check_")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("collective", COLLECTIVES, ids=name_of)
def test_collective_and_its_gradient(rank_group, collective, size):
    rank_group(size).run(collective)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
def test_layer_equals_torch(rank_group, layer, size):
    rank_group(size).run(layer)


def test_frozen_weights_pass_gradients_on(rank_group):
    rank_group(2).run(check_frozen_weights)


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
def test_bf16_gradients_are_near_fp32s(rank_group, sequence):
    rank_group(2).run(check_bf16_column_linear, sequence)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stack", [STACK, BARE_STACK], ids=["biases", "no biases"])
def test_block_equals_the_uncut_block(rank_group, stack, dropout, recompute, size):
    rank_group(size).run(check_block, stack, dropout, recompute)


@pytest.mark.parametrize("size", SIZES)
def test_cached_tokens_pass_a_block_as_without_sequence_parallelism(rank_group, size):
    rank_group(size).run(check_cached_block)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", MODELS)
def test_model_equals_the_model_without_sequence_parallelism(rank_group, name, recompute, size):
    rank_group(size).run(check_model, MODELS[name], recompute)


def test_a_block_keeps_nothing_of_all_tokens_but_what_its_cut_layers_make(rank_group):
    """fp32 numbers of all tokens: q, k, v, attention's answer, and MLP columns before and after GELU, all cut by P."""
    (kept, _), (without, _) = (rank_group(2).run(kept_bytes, sequence) for sequence in (True, False))
    tokens = 16 * S
    cut = 4 * tokens * E * (3 + 1 + 8) // 2
    assert without - cut > 1.9 * (kept - cut) > 0


@pytest.mark.parametrize(("qkv", "weight", "inputs"), [(False, [4, 6], 6), (True, [12, 8], 8)], ids=["column", "qkv"])
def test_the_input_gradients_all_reduce_runs_during_the_weight_product(rank_group, qkv, weight, inputs):
    assert rank_group(2).run(backward_events, False, qkv)[0] == [
        f"product {[B * S, inputs]}",
        "all_reduce starts",
        f"product {weight}",
        "all_reduce is waited for",
    ]


@pytest.mark.parametrize(("qkv", "weight", "inputs"), [(False, [4, 6], 6), (True, [12, 8], 8)], ids=["column", "qkv"])
def test_gathering_and_scattering_run_during_the_products(rank_group, qkv, weight, inputs):
    assert rank_group(2).run(backward_events, True, qkv)[0] == [
        "all_gather_into_tensor starts",
        f"product {[B * S, inputs]}",
        "reduce_scatter_tensor starts",
        "all_gather_into_tensor is waited for",
        f"product {weight}",
        "reduce_scatter_tensor is waited for",
    ]
