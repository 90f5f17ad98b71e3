"""A model built for ZeRO-3 is never whole on a rank, and is the model that is built whole and cut afterwards."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from live_engines import live_engine, train
from tiny_runs import CPU, ds_config, tiny_config, tiny_rqvae
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from megarq.config.models import StackConfig
from megarq.config.run import ParallelConfig, RQTransformerRunConfig
from megarq.engine.fragments import is_sharded, write_sharded
from megarq.engine.start import resolve_and_place
from megarq.engine.transformer_run import build_transformer
from megarq.parallel.topology import ProcessGroups
from megarq.planning.flops import layer_flops
from megarq.transformer.blocks import Block
from megarq.transformer.inputs import FrozenCodebook

LAYOUTS = [(1, 1, "fp32"), (2, 1, "bf16"), (4, 1, "fp32"), (4, 2, "fp32")]  # ranks, tp, precision


def config_of(precision: str = "fp32", sharded: bool = True, tp: int = 1) -> RQTransformerRunConfig:
    config = replace(tiny_config(precision=precision), parallel=ParallelConfig(tp=tp, sharded_init=sharded))
    config.model.body = StackConfig(layers=6, heads=4)
    return config


def parts_and_losses(
    config: RQTransformerRunConfig,
) -> tuple[dict[str, torch.Tensor], list[tuple[float, float]]]:
    """This rank's first parts of the parameters, and what two updates show."""
    engine, groups, _ = live_engine(config, ds_config(3), config.parallel.tp)
    parts = {}
    for name, parameter in engine.module.named_parameters():
        # Where a part is filled up with numbers of no meaning, only those before them are compared.
        start = parameter.ds_zero_partition_rank * parameter.ds_tensor.ds_numel
        parts[name] = parameter.ds_tensor.data[: max(0, parameter.ds_numel - start)].clone()
    seen = train(engine, config, groups.topology, range(2))
    engine.destroy()
    return parts, seen


@pytest.mark.parametrize(("ranks", "tp", "precision"), LAYOUTS)
def test_first_weights_and_losses_are_those_of_a_model_built_whole(rank_group, ranks, tp, precision):
    group = rank_group(ranks, f"tp{tp}")
    whole, cut = (group.run(parts_and_losses, config_of(precision, sharded, tp)) for sharded in (False, True))
    for (expected, losses), (parts, ours) in zip(whole, cut, strict=True):
        assert list(parts) == list(expected)
        assert all(torch.equal(parts[name], value) for name, value in expected.items())
        for a, b in zip(ours, losses, strict=True):
            assert a == pytest.approx(b, rel=1e-6)


def most_held(config: RQTransformerRunConfig) -> tuple[int, int, int]:
    """Most numbers that parameters held at once while the model was built, those of all, and those of a block."""
    resolved, topology = resolve_and_place(config, ds_config(3), dist.get_world_size(), dist.get_rank())
    groups, rqvae = ProcessGroups.build(topology), tiny_rqvae()
    parameters: list[Any] = []
    most = 0

    def look(*_: object) -> None:
        nonlocal most
        most = max(most, sum(p.numel() + (p.ds_tensor.numel() if is_sharded(p) else 0) for p in parameters))

    hooks = (
        register_module_parameter_registration_hook(lambda module, name, p: parameters.append(p)),
        register_module_module_registration_hook(look),
    )
    model = build_transformer(config, resolved, groups, CPU, layer_flops(config.model), rqvae)
    for hook in hooks:
        hook.remove()
    look()
    block = next(part for part in model.modules() if isinstance(part, Block))
    sizes = [sum(getattr(p, "ds_numel", p.numel()) for p in part.parameters()) for part in (model, block)]
    return most, *sizes


def test_no_rank_ever_holds_more_than_its_part_and_a_layer(rank_group):
    for most, whole, block in rank_group(2, "tp1").run(most_held, config_of()):
        assert whole > 7 * block
        assert whole / 2 < most < whole / 2 + block


def test_without_sharded_init_a_rank_holds_the_whole_model(rank_group):
    for most, whole, _ in rank_group(2, "tp1").run(most_held, config_of(sharded=False)):
        assert most == whole


def codebook_is_whole(config: RQTransformerRunConfig) -> bool:
    """Whether the frozen codebook, a buffer, is on this rank as the RQ-VAE has it."""
    engine, *_ = live_engine(config, ds_config(3))
    tables = [part.vectors for part in engine.module.modules() if isinstance(part, FrozenCodebook)]
    whole = all(torch.equal(table, tiny_rqvae().codebook_weights()) for table in tables)
    engine.destroy()
    return bool(tables) and whole


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_frozen_codebook_stays_whole_and_fp32(rank_group, precision):
    assert rank_group(2, "tp1").run(codebook_is_whole, config_of(precision)) == [True, True]


def test_a_parameter_that_is_not_cut_is_written_whole():
    parameter = nn.Parameter(torch.zeros(3))
    write_sharded(parameter, torch.arange(3.0))
    assert parameter.tolist() == [0, 1, 2]
