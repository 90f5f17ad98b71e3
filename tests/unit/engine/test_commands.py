"""The two training commands up to the point where a process group would be needed."""

from pathlib import Path

import pytest

from megarq import cli, train, train_rqvae
from megarq.errors import CheckpointError, ConfigError

COMPLETE = ["--model", "demo", "--data", "codes", "--output", "run"]


@pytest.fixture(autouse=True)
def started_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_ds_config_alone_is_answered_with_the_complete_command():
    with pytest.raises(ConfigError) as error:
        train.main(["--ds_config", "zero3.json"])
    assert str(error.value) == (
        "--model, --data, --output missing. The complete command:\n"
        "    deepspeed megarq/train.py --ds_config zero3.json --model t2i-3.9b --data CODES --output RUN "
        "--tokenizer tokenizer.json [key=value ...]"
    )


def test_what_was_given_stands_in_the_complete_command():
    with pytest.raises(ConfigError) as error:
        train.main(["--ds_config", "zero1.json", "--model", "demo", "--output", "my run", "train.steps=3"])
    assert str(error.value) == (
        "--data missing. The complete command:\n"
        "    deepspeed megarq/train.py --ds_config zero1.json --model demo --data CODES --output 'my run' "
        "--tokenizer tokenizer.json train.steps=3"
    )


def test_the_rqvae_command_is_its_own():
    with pytest.raises(ConfigError) as error:
        train_rqvae.main([])
    assert str(error.value).endswith(
        "deepspeed megarq/train_rqvae.py --ds_config zero1.json --model rqvae-8x8x4 --data 'shards/*.tar' "
        "--output RUN [key=value ...]"
    )


def test_a_finetuning_needs_no_model():
    with pytest.raises(ConfigError) as error:
        train_rqvae.main(["--init-from", "runs/in net", "--init-weights", "ema", "train.epochs=1"])
    assert str(error.value) == (
        "--data, --output missing. The complete command:\n"
        "    deepspeed megarq/train_rqvae.py --ds_config zero1.json --data 'shards/*.tar' --output RUN "
        "--init-from 'runs/in net' --init-weights ema train.epochs=1"
    )


def test_a_finetuning_may_name_its_model():
    with pytest.raises(ConfigError, match=r"--model rqvae-church-8x8x4 --data .* --init-from runs/imagenet"):
        train_rqvae.main(["--model", "rqvae-church-8x8x4", "--init-from", "runs/imagenet"])


def test_a_finetuning_without_a_source_is_refused(tmp_path):
    options = ["--init-from", str(tmp_path), "--data", "x.tar", "--output", "run", "train.epochs=1"]
    with pytest.raises(CheckpointError, match="holds neither config.json nor checkpoints nor config.yaml"):
        train_rqvae.main(options)


def test_a_finetuning_takes_its_architecture_from_the_source():
    source = str(Path(__file__).parents[2] / "reference" / "rqvae")
    options = ["--init-from", source, "--data", "x.tar", "--output", "run", "train.epochs=1"]
    with pytest.raises(ConfigError, match=r"attention_resolutions=\[3\]: the levels have \[32, 16, 8\]"):
        train_rqvae.main([*options, "model.attention_resolutions=[3]"])


def test_an_unknown_key_stops_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown key trian.lr \(command line\). Did you mean train.lr\?"):
        train.main([*COMPLETE, "trian.lr=1"])


def test_an_unknown_model_stops_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean demo"):
        train.main(["--model", "demoo", "--data", "codes", "--output", "run"])


def test_an_rq_vae_is_not_trained_by_the_transformers_command():
    with pytest.raises(ConfigError, match=r"Use megarq/train_rqvae.py"):
        train.main(["--model", "rqvae-demo", "--data", "codes", "--output", "run"])


def test_an_unknown_ds_config_stops_with_those_there_are():
    with pytest.raises(ConfigError, match=r"zero4.json: no such file.*zero1, zero2, zero3"):
        train.main(["--ds_config", "zero4.json", *COMPLETE])


def test_pipelines_are_refused():
    with pytest.raises(ConfigError, match="parallel.pp=2"):
        train.main(["--ds_config", "zero3.json", *COMPLETE, "parallel.pp=2"])


def test_tensor_parallelism_without_ranks_is_refused():
    with pytest.raises(ConfigError, match="parallel.tp=2 x parallel.pp=1 = 2 does not divide the 1 ranks started"):
        train.main([*COMPLETE, "parallel.tp=2"])


def test_keys_may_stand_before_and_after_options():
    with pytest.raises(ConfigError, match="global_batch_size=64"):
        train.main(["train.micro_batch_size=7", *COMPLETE, "train.steps=3"])


def test_the_rqvae_command_refuses_stage_3():
    options = ["--ds_config", "zero3.json", "--model", "rqvae-demo", "--data", "x.tar", "--output", "run"]
    with pytest.raises(ConfigError, match=r"ZeRO stage 3 for an RQ-VAE.*Use --ds_config zero1.json or zero2.json"):
        train_rqvae.main(options)


def test_more_codes_than_latents_are_refused_for_kmeans():
    options = ["--ds_config", "zero1.json", "--model", "rqvae-demo", "--data", "x.tar", "--output", "run"]
    changes = ["codebook.init=kmeans", "codebook.init_batches=1", "codebook.init_latents=200"]
    with pytest.raises(ConfigError, match=r"codebook.init_latents=200 allows, 200 latents for 256 codes. Give more"):
        train_rqvae.main([*options, *changes])


@pytest.mark.parametrize("command", [train, train_rqvae])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    assert f"deepspeed megarq/{command.__name__.rpartition('.')[2]}.py --ds_config" in capsys.readouterr().out


def test_an_error_is_printed_without_traceback(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", *COMPLETE, "trian.lr=1"])
    assert cli.run(train.main) == 2
    assert capsys.readouterr().err == "error: unknown key trian.lr (command line). Did you mean train.lr?\n"


def test_a_configuration_error_is_printed_by_rank_0_alone(monkeypatch, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["train.py", *COMPLETE, "trian.lr=1"])
    assert cli.run(train.main) == 2
    assert capsys.readouterr().err == ""
