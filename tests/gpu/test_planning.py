"""The planner's bytes against those that a GPU's allocator counts; skipped where there is none."""

from dataclasses import replace

import pytest
import torch

from megarq.config.models import RQTransformerConfig, StackConfig
from megarq.config.run import RQTransformerRunConfig
from megarq.planning.activations import activation_bytes, working_bytes
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
