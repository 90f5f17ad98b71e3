import shlex

import pytest

from megarq import train
from megarq.config.layout import check_layout
from megarq.config.load import load_config
from megarq.errors import ConfigError
from megarq.planning.layout import Layout
from megarq.planning.layouts import (
    chosen_layouts,
    ds_config_name,
    launch_command,
    lawful_layouts,
    micro_batches,
    shipped_ds_config,
)


def test_pipelines_run_under_zero_1_alone(run_config) -> None:
    layouts = list(lawful_layouts(run_config, 4, 4))
    assert {layout.zero for layout in layouts if layout.pp > 1} == {1}
    assert {layout.zero for layout in layouts if layout.pp == 1 and layout.dp > 1} == {1, 2, 3}


def test_tensor_groups_stay_inside_a_node(run_config) -> None:
    assert {layout.tp for layout in lawful_layouts(run_config, 12, 4)} == {1, 2, 4}


def test_a_tp_that_cuts_heads_is_not_lawful(run_config) -> None:
    assert 3 not in {layout.tp for layout in lawful_layouts(run_config, 6, 6)}


def test_every_layout_comes_with_and_without_recomputation(run_config) -> None:
    layouts = list(lawful_layouts(run_config, 2, 2))
    assert [layout.activation_checkpointing for layout in layouts] == [False, True] * (len(layouts) // 2)


def test_the_plainest_layout_comes_first(run_config) -> None:
    assert next(lawful_layouts(run_config, 4, 4)) == Layout(1, 1, 4, 1)


def test_no_lawful_layout_is_refused_with_the_reason(run_config) -> None:
    with pytest.raises(
        ConfigError, match="no layout over 11 GPUs is lawful: train.global_batch_size=12 is not divisible"
    ):
        list(lawful_layouts(run_config, 11, 11))


def test_nodes_that_are_not_full_are_refused(run_config) -> None:
    with pytest.raises(ConfigError, match=r"--gpus 12 with --gpus-per-node 8: the nodes would differ. Give a multiple"):
        list(lawful_layouts(run_config, 12, 8))


def test_micro_batches_divide_a_ranks_share(run_config) -> None:
    sizes = [(one.micro_batch, one.accumulation) for one in micro_batches(run_config, Layout(1, 1, 2, 1))]
    assert sizes == [(1, 6), (2, 3), (3, 2), (6, 1)]


def test_a_stated_micro_batch_is_kept(run_config) -> None:
    run_config.train.micro_batch_size = 3
    assert [one.micro_batch for one in micro_batches(run_config, Layout(1, 1, 2, 1))] == [3]


def test_chosen_layouts_are_those_named(run_config) -> None:
    chosen = chosen_layouts("tp=2,sequence=true,zero=3", list(lawful_layouts(run_config, 4, 4)))
    assert {(one.tp, one.pp, one.zero, one.sequence) for one in chosen} == {(2, 1, 3, True)}


def test_an_unknown_choice_is_refused_with_the_nearest(run_config) -> None:
    with pytest.raises(ConfigError, match=r"--layout tpp=2: 'tpp' is none of .* Did you mean tp\?"):
        chosen_layouts("tpp=2", [])


def test_a_choice_that_is_not_lawful_is_refused(run_config) -> None:
    with pytest.raises(ConfigError, match="--layout tp=8: no lawful layout has tp=8. Choose tp among 1."):
        chosen_layouts("tp=8", [Layout(1, 1, 1, 1)])


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, 1, 8, 2, micro_batch=4, accumulation=64),
        Layout(2, 1, 4, 3, sequence=True, micro_batch=8, accumulation=64),
        Layout(2, 2, 2, 1, micro_batch=1, accumulation=1024, activation_checkpointing=True),
    ],
)
def test_the_command_starts_the_layout(layout) -> None:
    config = load_config("t2i-3.9b", architecture="rq-transformer")
    words = shlex.split(launch_command("t2i-3.9b", config, layout, 8, ["train.lr=1e-3", "parallel.tp=4"]))
    assert words[:4] == ["deepspeed", "--num_gpus", "8", "megarq/train.py"]
    args = train.parser().parse_intermixed_args(words[4:])
    assert args.ds_config == ds_config_name(layout) and args.tokenizer
    started = load_config(args.model, args.overrides, "rq-transformer")
    check_layout(started.model, started.parallel, started.train, shipped_ds_config(layout), layout.world)
    parallel = started.parallel
    assert (parallel.tp, parallel.pp, parallel.sequence) == (layout.tp, layout.pp, layout.sequence)
    assert started.train.micro_batch_size == layout.micro_batch
    assert started.train.activation_checkpointing is layout.activation_checkpointing
    assert started.train.lr == 1e-3


def test_several_nodes_are_started_by_torchrun(run_config) -> None:
    command = launch_command("demo", run_config, Layout(1, 1, 16, 1), 8, [])
    assert command.startswith("torchrun --nnodes 2 --nproc-per-node 8 ")
