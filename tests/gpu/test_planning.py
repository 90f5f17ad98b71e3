"""The planner's bytes against those that a GPU's allocator counts; skipped where there is none."""

import gc
from dataclasses import replace

import pytest
import torch

from benchmarks import train_step
from megarq.config.deepspeed import read_ds_config
from megarq.config.models import RQTransformerConfig, StackConfig
from megarq.config.names import CONFIGS
from megarq.config.run import RQTransformerRunConfig, TrainConfig
from megarq.engine.start import resolve_and_place
from megarq.parallel.topology import ProcessGroups
from megarq.planning.activations import activation_bytes, working_bytes
from megarq.planning.estimate import GIB
from megarq.planning.layout import Layout
from megarq.transformer.rq_transformer import RQTransformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MODEL = RQTransformerConfig(
    embed_dim=1024,
    body=StackConfig(layers=8, heads=16),
    head=StackConfig(layers=2, heads=16),
    cond_length=32,
)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_and_peak_are_those_of_the_allocator(dropout, recompute):
    config = RQTransformerRunConfig()
    config.model = replace(MODEL, dropout=dropout)
    layout = Layout(1, 1, 1, 1, micro_batch=16, activation_checkpointing=recompute)
    model = RQTransformer(config.model, activation_checkpointing=recompute)
    model.initialize(0)
    model.to("cuda", torch.bfloat16).train()
    codes = torch.zeros(16, *config.model.code_shape, dtype=torch.int64, device="cuda")
    cond = torch.zeros(16, config.model.cond_length, dtype=torch.int64, device="cuda")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    stage = [layer.name for layer in model.layers]

    def loss() -> torch.Tensor:
        image, caption = model(codes, cond, codes)
        return image.mean() + caption.mean()

    loss().backward()  # workspaces of the libraries
    before = torch.cuda.memory_allocated()
    kept = loss()
    saved = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    kept.backward()
    peak = torch.cuda.max_memory_allocated() - before
    planned = activation_bytes(config, layout, stage)
    assert saved == pytest.approx(planned, rel=0.1)
    assert peak == pytest.approx(planned + working_bytes(config, layout, stage), rel=0.1)


def workspaces() -> None:
    """Let the libraries take theirs, for the forward and the backward pass."""
    x = torch.ones(64, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    torch.nn.functional.linear(x, x, x[0]).sum().backward()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_peak_of_a_whole_engine_is_at_most_the_planned_one(nccl_group, stage):
    """108M parameters, and samples enough for activations to outweigh the buckets, of which the plan is a bound."""
    config = RQTransformerRunConfig()
    blocks = {"body": StackConfig(layers=12, heads=11), "head": StackConfig(layers=4, heads=11)}
    config.model = RQTransformerConfig(embed_dim=704, cond_length=1, cond_vocab_size=1000, **blocks)
    config.train = TrainConfig(steps=1, global_batch_size=256)
    ds = read_ds_config(CONFIGS / "deepspeed" / f"zero{stage}.json")
    ds, topology = resolve_and_place(config, ds, world_size=1, rank=0)
    groups = ProcessGroups.build(topology)
    rqvae = train_step.codebook_holder(config)  # of the planner's reserve, which is left out
    besides = sum(tensor.nbytes for tensor in (*rqvae.parameters(), *rqvae.buffers()))
    workspaces()
    gc.collect()
    besides += torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    few = train_step.parse(["--model", "", "--steps", "2", "--warm-up", "1"])
    _, peak = train_step.measure(config, ds, groups, torch.device("cuda"), few)
    planned = train_step.plan_alone(config, ds, groups).needed
    assert 0.8 * planned <= peak * GIB - besides <= planned
