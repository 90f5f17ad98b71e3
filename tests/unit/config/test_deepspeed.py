"""Every rule about --ds_config: what is refused, with which words, and what is filled in."""

import json
from pathlib import Path

import pytest

from megarq.config.deepspeed import batch_sizes, read_ds_config, resolve_ds_config, zero_stage
from megarq.config.names import CONFIGS
from megarq.config.run import ParallelConfig, TrainConfig
from megarq.errors import ConfigError

TRAIN = TrainConfig(steps=10, global_batch_size=64, micro_batch_size=8, lr=1e-3, clip=1.0, precision="bf16")
ALONE = ParallelConfig()


@pytest.fixture
def read(tmp_path: Path):
    """`read({...})`: the same object, by way of a file."""

    def write_and_read(content: object) -> dict:
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_ds_config(path)

    return write_and_read


def resolve(ds: dict, train: TrainConfig = TRAIN, parallel: ParallelConfig = ALONE, data_parallel: int = 2) -> dict:
    return resolve_ds_config(ds, train, parallel, data_parallel)


SHIPPED = sorted(path.name for path in (CONFIGS / "deepspeed").glob("*.json"))


STAGES = {"zero1.json": 1, "zero2.json": 2, "zero3.json": 3, "zero3-offload.json": 3, "pipeline.json": 1}


def test_what_is_shipped():
    assert set(SHIPPED) == set(STAGES)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_are_read_and_resolved(name):
    ds = resolve(read_ds_config(CONFIGS / "deepspeed" / name))
    assert zero_stage(ds) == STAGES[name]
    assert "auto" not in json.dumps(ds)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_reduce_and_accumulate_in_fp32(name):
    ds = resolve(read_ds_config(CONFIGS / "deepspeed" / name))
    assert ds["communication_data_type"] == "fp32"
    assert ds["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize(
    ("ds", "unknown", "nearest"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping", "gradient_clipping"),
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation", "zero_optimization"),
        ({"zero_optimization": {"stge": 3}}, "zero_optimization.stge", "stage"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise",
            "device",
        ),
        ({"bf16": {"enabeld": True}}, "bf16.enabeld", "enabled"),
        ({"optimizer": {"params": {"learning_rate": 1}}}, "optimizer.params.learning_rate", None),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "data_types.grad_acum_dtype", "grad_accum_dtype"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(read, ds, unknown, nearest):
    with pytest.raises(ConfigError) as error:
        read(ds)
    expected = f"Did you mean {nearest}?" if nearest else "Remove it."
    assert f"unknown key {unknown}. {expected}" in str(error.value)


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("scheduler", "train.schedule"),
        ("fp16", "train.precision"),
        ("activation_checkpointing", "train.activation_checkpointing"),
    ],
)
def test_what_is_ours_to_say_is_refused_with_our_key(read, key, ours):
    with pytest.raises(ConfigError, match=f"{key} is not taken from ds_config. Use {ours}"):
        read({key: {}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{stage: 3}", "is not JSON"),
        ('{"bf16": {"enabled": true},}', "is not JSON"),
        ("[1, 2]", "holds a list"),
        ({"bf16": True}, "bf16=true: expected an object"),
        ({"zero_optimization": 3}, "zero_optimization=3: expected an object"),
        ({"optimizer": {"params": [1]}}, r"optimizer.params=\[1\]: expected an object"),
    ],
)
def test_what_is_not_an_object_is_refused(read, content, message):
    with pytest.raises(ConfigError, match=message):
        read(content)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "ds.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_ds_config(tmp_path / "ds.json")


def test_offload_may_be_null(read):
    assert read({"zero_optimization": {"offload_optimizer": None}})


def test_what_is_left_out_is_filled():
    ds = resolve({})
    assert ds["train_batch_size"] == 64
    assert ds["train_micro_batch_size_per_gpu"] == 8
    assert ds["gradient_accumulation_steps"] == 4
    assert ds["gradient_clipping"] == 1.0
    assert ds["bf16"] == {"enabled": True}
    assert ds["zero_optimization"] == {"stage": 1}


def test_auto_is_filled():
    auto = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
    }
    filled = resolve({})
    assert resolve(auto) == filled


def test_fp32_turns_bf16_off():
    assert resolve({}, TrainConfig(steps=1, precision="fp32"))["bf16"] == {"enabled": False}


def test_what_agrees_is_kept():
    assert resolve({"train_batch_size": 64, "steps_per_print": 5})["steps_per_print"] == 5


@pytest.mark.parametrize(
    ("ds", "theirs", "ours"),
    [
        ({"train_batch_size": 32}, "train_batch_size=32", "train.global_batch_size gives 64"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu=4", "train.micro_batch_size gives 8"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps=1", "data-parallel ranks) gives 4"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5", "train.clip gives 1.0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled=false", "train.precision=bf16 gives true"),
        ({"optimizer": {"params": {"lr": 0.1}}}, "optimizer.params.lr=0.1", "train.lr gives 0.001"),
        ({"optimizer": {"params": {"betas": [0.9, 0.99]}}}, "optimizer.params.betas=[0.9, 0.99]", "train.betas gives"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type='Lamb'", "AdamW"),
        ({"optimizer": {"params": {"eps": 1e-6}}}, "optimizer.params.eps=1e-06", "AdamW here has 1e-08"),
        (
            {"optimizer": {"params": {"adam_w_mode": False}}},
            "optimizer.params.adam_w_mode=false",
            "AdamW here has true",
        ),
    ],
)
def test_contradictions_are_refused_naming_both(ds, theirs, ours):
    with pytest.raises(ConfigError) as error:
        resolve(ds)
    assert theirs in str(error.value) and ours in str(error.value)


def test_a_batch_that_ranks_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match="train.global_batch_size=64 is not divisible by the 3 data-parallel ranks"):
        resolve({}, data_parallel=3)


def test_a_micro_batch_that_does_not_divide_a_share_is_refused():
    train = TrainConfig(steps=1, global_batch_size=64, micro_batch_size=5)
    with pytest.raises(ConfigError, match="train.micro_batch_size=5 does not divide a rank's share of the batch, 32"):
        resolve({}, train)


def test_without_a_micro_batch_there_is_no_accumulation():
    assert batch_sizes(TrainConfig(steps=1, global_batch_size=64), 4) == (16, 1)


def test_stage_0_runs_as_stage_1_and_says_so(caplog):
    assert zero_stage(resolve({"zero_optimization": {"stage": 0}})) == 1
    assert "zero_optimization.stage=0 runs as stage 1" in caplog.text


def test_a_stage_that_is_not_stated_is_1_without_a_word(caplog):
    assert zero_stage(resolve({})) == 1
    assert not caplog.text


@pytest.mark.parametrize("parallel", [ParallelConfig(tp=2), ParallelConfig(pp=2)])
def test_stage_0_of_a_cut_model_is_refused(parallel):
    with pytest.raises(ConfigError, match="with ZeRO stage 0.*gradient norm.*Use --ds_config zero1.json"):
        resolve({"zero_optimization": {"stage": 0}}, parallel=parallel)


@pytest.mark.parametrize("stage", [4, -1, "three", "auto", None])
def test_another_stage_is_refused(stage):
    with pytest.raises(ConfigError, match="zero_optimization.stage=.*use 1, 2 or 3"):
        resolve({"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize("stage", [2, 3])
def test_pipelines_with_stage_2_or_3_are_refused(stage):
    with pytest.raises(ConfigError) as error:
        resolve({"zero_optimization": {"stage": stage}}, parallel=ParallelConfig(pp=2))
    assert str(error.value) == (
        f"parallel.pp=2 with ZeRO stage {stage}: DeepSpeed pipelines allow stages 0 and 1. "
        "Use --ds_config zero1.json or parallel.pp=1."
    )


def test_pipelines_with_stage_1_are_allowed():
    assert zero_stage(resolve({"zero_optimization": {"stage": 1}}, parallel=ParallelConfig(pp=2))) == 1


WHOLE = {"pipe_partitioned": False, "grad_partitioned": False}


@pytest.mark.parametrize(
    "stated", [{}, {"pipeline": {}}, {"pipeline": WHOLE}, {"pipeline": {"pipe_partitioned": "auto"}}]
)
def test_tensors_travel_whole_between_stages(stated):
    assert resolve(stated, parallel=ParallelConfig(pp=2))["pipeline"] == WHOLE


def test_without_stages_the_pipeline_section_is_left_out():
    assert "pipeline" not in resolve({"pipeline": WHOLE})


@pytest.mark.parametrize("key", WHOLE)
def test_tensors_cut_between_stages_are_refused(key):
    with pytest.raises(ConfigError, match=f"pipeline.{key}=true.*Set it to false"):
        resolve({"pipeline": {key: True}})


CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    ("zero", "parallel", "message"),
    [
        ({"stage": 3, "offload_param": {"device": "nvme"}}, ALONE, 'offload_param.device=nvme.*Use "cpu"'),
        ({"stage": 1, "offload_optimizer": {"device": "nvme"}}, ALONE, 'offload_optimizer.device=nvme.*Use "cpu"'),
        ({"stage": 2, "offload_param": CPU}, ALONE, "offload_param with stage 2.*Use --ds_config zero3-offload.json"),
        ({"stage": 3, "offload_optimizer": CPU | {"ratio": 0.5}}, ALONE, "ratio=0.5.*Remove the keys"),
        ({"stage": 3, "offload_optimizer": CPU | {"super_offload": True}}, ALONE, "super_offload=true.*Remove"),
        ({"stage": 1, "offload_optimizer": CPU}, ParallelConfig(pp=2), "parallel.pp=2 with .*offload_optimizer"),
        ({"stage": 2, "zero_hpz_partition_size": 2}, ALONE, "zero_hpz_partition_size=2 with stage 2.*Use stage 3"),
        ({"stage": 3, "zero_hpz_partition_size": 3}, ALONE, "=3, which does not divide the 2 data-parallel ranks"),
        ({"stage": 3, "zero_hpz_partition_size": 2}, ParallelConfig(tp=2), "with parallel.tp=2.*Use parallel.tp=1"),
    ],
)
def test_what_a_stage_or_layout_cannot_do_is_refused(zero, parallel, message):
    with pytest.raises(ConfigError, match=message):
        resolve({"zero_optimization": zero}, parallel=parallel)


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 1, "offload_optimizer": CPU},
        {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
        {"stage": 2, "offload_param": {"device": "none"}},
        {"stage": 2, "offload_optimizer": None, "zero_hpz_partition_size": 1},
        {"stage": 3, "zero_hpz_partition_size": 2},
    ],
)
def test_what_a_stage_can_do_is_kept(zero):
    assert resolve({"zero_optimization": zero})["zero_optimization"] == zero


def test_fp16_that_is_off_is_no_contradiction(tmp_path):
    (tmp_path / "ds.json").write_text('{"fp16": {"enabled": false}, "zero_optimization": {"stage": 2}}')
    resolved = resolve_ds_config(read_ds_config(tmp_path / "ds.json"), TrainConfig(steps=1), ParallelConfig(), 1)
    assert "fp16" not in resolved


@pytest.mark.parametrize(
    ("zero", "key"),
    [
        ({"stage": 2, "reduce_bucket_size": "big"}, "zero_optimization.reduce_bucket_size='big'"),
        ({"stage": 2, "offload_optimizer": {"device": "gpu"}}, "zero_optimization.offload_optimizer.device='gpu'"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(tmp_path, zero, key):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(ConfigError, match=f"{key}.*Correct the value"):
        read_ds_config(tmp_path / "ds.json")


def test_auto_is_left_to_deepspeed_where_the_run_does_not_decide():
    stated = {"communication_data_type": "auto", "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
    resolved = resolve_ds_config(stated, TrainConfig(steps=1), ParallelConfig(), 1)
    assert resolved["communication_data_type"] == "fp32"
    assert "reduce_bucket_size" not in resolved["zero_optimization"]


@pytest.mark.parametrize(("section", "package"), [("wandb", "wandb"), ("comet", "comet_ml")])
def test_a_monitor_without_its_package_is_refused_on_all_ranks(monkeypatch, section, package):
    monkeypatch.setattr("megarq.config.deepspeed.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"{section}.enabled=true, but {package} is not installed"):
        resolve_ds_config({section: {"enabled": True}}, TrainConfig(steps=1), ParallelConfig(), 1)
    resolve_ds_config({section: {"enabled": False}}, TrainConfig(steps=1), ParallelConfig(), 1)
