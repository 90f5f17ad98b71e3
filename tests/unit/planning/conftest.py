import pytest

from megarq.config.models import RQTransformerConfig, StackConfig
from megarq.config.run import RQTransformerRunConfig, TrainConfig
from megarq.planning.communication import Links
from megarq.planning.estimate import GIB, Machine


@pytest.fixture
def run_config() -> RQTransformerRunConfig:
    """A small run with captions: batches of 12, eight heads, 3 + 2 blocks."""
    model = RQTransformerConfig(
        code_shape=[4, 4, 4],
        codebook_size=64,
        codebook_dim=16,
        embed_dim=128,
        body=StackConfig(layers=3, heads=8),
        head=StackConfig(layers=2, heads=8),
        cond_length=9,
        cond_vocab_size=32,
        dropout=0.0,
    )
    return RQTransformerRunConfig(model=model, train=TrainConfig(steps=10, global_batch_size=12))


@pytest.fixture
def machine() -> Machine:
    """Four GPUs of 80 GiB, two in a node, with round speeds."""
    return Machine(
        gpus=4,
        links=Links(inside=100e9, between=10e9, gpus_per_node=2),
        memory=80 * GIB,
        reserve=2 * GIB,
        peak=1e12,
        efficiency=0.5,
        memory_bandwidth=1e12,
    )
