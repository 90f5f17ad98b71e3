"""What a run checks before it starts: layout, the run that is there already, files kept beside it."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from made_up_checkpoints import save_alone

from megarq.checkpoint.format import Fragment
from megarq.config.load import load_config
from megarq.config.run import RQTransformerRunConfig, RQVAERunConfig
from megarq.data.order import LoaderState
from megarq.engine.session import Session, copy_once
from megarq.engine.start import joined_session, resolve_and_place
from megarq.errors import CheckpointError, ConfigError
from megarq.launch.environment import read_environment
from megarq.launch.process_group import joined
from megarq.parallel.topology import Topology

CPU = torch.device("cpu")


@pytest.fixture
def alone():
    """A default process group of one."""
    with joined(read_environment({}), CPU):
        yield
    assert not dist.is_initialized()


def config_of(**model: object) -> RQTransformerRunConfig:
    config = load_config("demo", [f"model.{key}={value}" for key, value in model.items()], "rq-transformer")
    assert isinstance(config, RQTransformerRunConfig)
    return config


def publish(run: Path, config: RQTransformerRunConfig | RQVAERunConfig, step: int = 5) -> Path:
    """A checkpoint as a run of this configuration leaves it; returns its folder."""
    metadata = {
        "architecture": config.architecture,
        "config": asdict(config),
        "loader": {"epoch": 1, "sample": 40},
        "optimizer_step": step,
    }
    return save_alone(run, step, {"param/w": (Fragment((2,)), torch.ones(2))}, metadata)


def open_session(config: RQTransformerRunConfig, run: Path) -> Session:
    return Session.open(config, {}, Topology(), run, CPU)


def test_a_new_run_starts_at_the_first_sample(alone, tmp_path):
    session = open_session(config_of(), tmp_path / "run")
    assert session.checkpoint is None and session.start == LoaderState(0, 0)


def test_the_resolved_configuration_is_written(alone, tmp_path):
    open_session(config_of(dropout=0.25), tmp_path / "run")
    again = load_config(str(tmp_path / "run" / "config.resolved.yaml"), [])
    assert again == config_of(dropout=0.25)


def test_a_run_that_is_there_goes_on(alone, tmp_path):
    publish(tmp_path, config_of())
    session = open_session(config_of(), tmp_path)
    assert session.checkpoint is not None and session.checkpoint.metadata["step"] == 5
    assert session.start == LoaderState(1, 40)


def test_a_run_of_another_model_is_refused(alone, tmp_path):
    publish(tmp_path, config_of(embed_dim=48))
    with pytest.raises(ConfigError, match="holds a run with model.embed_dim=48, this one has 96"):
        open_session(config_of(embed_dim=96), tmp_path)


def test_dropout_may_change_when_a_run_goes_on(alone, tmp_path):
    publish(tmp_path, config_of(dropout=0.1))
    assert open_session(config_of(dropout=0.3), tmp_path).checkpoint is not None


def test_a_run_of_another_architecture_is_refused(alone, tmp_path):
    rqvae = load_config("rqvae-demo", [], "rq-vae")
    publish(tmp_path, rqvae)
    with pytest.raises(ConfigError, match="holds a run of an rq-vae, this one trains an rq-transformer"):
        open_session(config_of(), tmp_path)


def change_a_byte(step: Path) -> None:
    path = step / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_run_goes_on_from_the_step_before_a_damaged_one(alone, tmp_path, caplog):
    publish(tmp_path, config_of())
    change_a_byte(publish(tmp_path, config_of(), 9))
    session = open_session(config_of(), tmp_path)
    assert session.checkpoint is not None and session.checkpoint.metadata["step"] == 5
    assert "step-00000009 is passed over" in caplog.text and "has the sha256" in caplog.text


def test_a_run_none_of_whose_checkpoints_is_whole_is_refused(alone, tmp_path):
    change_a_byte(publish(tmp_path, config_of()))
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        open_session(config_of(), tmp_path)


def test_a_run_says_what_started_its_ranks(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"PROCID": "0", "NTASKS": "1", "LOCALID": "0", "STEP_ID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with joined_session(config_of(), "zero1.json", str(tmp_path / "run")) as session:
        assert "1 x cpu (launcher: srun): dp 1" in session._opening(SimpleNamespace(steps=5), 0)


@pytest.mark.parametrize(
    ("model", "precision", "products"),
    [
        ("demo", "bf16", "bf16"),
        ("demo", "fp32", "fp32"),
        ("rqvae-demo", "bf16", "bf16"),
        ("rqvae-demo", "fp32", "tf32"),
    ],
)
def test_convolutions_in_fp32_are_multiplied_in_tf32(alone, tmp_path, model, precision, products):
    config = load_config(model, [f"train.precision={precision}"])
    assert Session.open(config, {}, Topology(), tmp_path / "run", CPU).products == products
    torchs = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    assert torchs == ("none", "tf32"), "what the rule rests on"


def test_layouts_are_checked_without_a_process_group():
    config = config_of()
    config.parallel.tp = 2
    ds, topology = resolve_and_place(config, {"zero_optimization": {"stage": 3}}, 4, 3)
    assert (topology.dp, topology.data_rank, topology.tensor_rank) == (2, 1, 1)
    assert ds["train_micro_batch_size_per_gpu"] == 32


def test_pipelines_under_stage_3_are_refused_without_a_process_group():
    config = config_of()
    config.parallel.pp = 2
    with pytest.raises(ConfigError, match="with ZeRO stage 3"):
        resolve_and_place(config, {"zero_optimization": {"stage": 3}}, 2, 0)


def test_a_file_is_copied_into_the_run_once(tmp_path):
    (tmp_path / "tokenizer.json").write_text("one")
    run = tmp_path / "run"
    run.mkdir()
    copy_once(tmp_path / "tokenizer.json", run, "tokenizer.json")
    copy_once(tmp_path / "tokenizer.json", run, "tokenizer.json")
    assert (run / "tokenizer.json").read_text() == "one"


def test_another_file_than_the_runs_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("two")
    run = tmp_path / "run"
    run.mkdir()
    (run / "tokenizer.json").write_text("one")
    with pytest.raises(ConfigError, match="differs from .* go on with the file that the run was started with"):
        copy_once(tmp_path / "tokenizer.json", run, "tokenizer.json")
