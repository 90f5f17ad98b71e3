"""Exporting runs: which weights, in which dtype, with which RQ-VAE and tokenizer."""

import importlib.util
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from megarq.checkpoint.format import Fragment
from megarq.checkpoint.run_folder import publish_checkpoint
from megarq.config.run import RQTransformerRunConfig, RQVAERunConfig, SamplingConfig
from megarq.errors import CheckpointError, ConfigError
from megarq.inference.export import export_run
from megarq.inference.model_folder import read_info
from megarq.inference.pretrained import load_pretrained, load_rqvae, save_rqvae
from megarq.rqvae.model import fingerprint
from megarq.text.tokenizer import TextTokenizer


@pytest.fixture(scope="session")
def command():
    """tools/export.py's main."""
    path = Path(__file__).parents[3] / "tools" / "export.py"
    spec = importlib.util.spec_from_file_location("export", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def whole(tensors, kind):
    return {f"{kind}/{name}": (Fragment(tuple(tensor.shape)), tensor) for name, tensor in tensors.items()}


def publish(run, step, tensors, config, **metadata):
    metadata = {"architecture": config.architecture, "config": asdict(config)} | metadata
    publish_checkpoint(run, step, tensors, metadata, keep=0, rank=0, gather=lambda thing: [thing])


@pytest.fixture(scope="module")
def models(build):
    return build()


@pytest.fixture
def run(models, tokenizer_file, tmp_path):
    """A run with checkpoints of steps 10 (weights doubled) and 20."""
    folder = tmp_path / "run"
    config = RQTransformerRunConfig(model=models.transformer.config, sampling=SamplingConfig(top_k=5, top_p=0.9))
    weights = dict(models.transformer.named_parameters())
    publish(folder, 10, whole({name: 2 * tensor for name, tensor in weights.items()}, "param"), config)
    publish(folder, 20, whole(weights, "param"), config)
    save_rqvae(models.rqvae, folder / "rqvae")
    TextTokenizer.load(tokenizer_file).save(folder)
    return folder


@pytest.fixture
def averaged_run(run, models):
    """The run with a checkpoint of step 30 that keeps a moving average, three times the weights."""
    config = RQTransformerRunConfig(model=models.transformer.config)
    weights = dict(models.transformer.named_parameters())
    tensors = whole(weights, "param") | whole({name: 3 * tensor for name, tensor in weights.items()}, "ema")
    publish(run, 30, tensors, config, rqvae_fingerprint=fingerprint(models.rqvae))
    return run


@pytest.fixture
def rqvae_run(models, tmp_path):
    trained = dict(models.rqvae.named_parameters())
    buffers = {name: tensor for name, tensor in models.rqvae.state_dict().items() if name not in trained}
    tensors = whole(trained, "param") | whole(buffers, "buffer")
    publish(tmp_path / "rqvae-run", 7, tensors, RQVAERunConfig(model=models.rqvae.config))
    return tmp_path / "rqvae-run"


def scale_of(folder, models):
    loaded = load_pretrained(folder).transformer.body_input.positions
    return float((loaded.detach() / models.transformer.body_input.positions).mean())


def test_an_exported_run_answers_as_the_trained_model(run, models, command, tmp_path, random_inputs):
    command([str(run), "--output", str(tmp_path / "model")])
    inputs = random_inputs(models.transformer.config)
    loaded = load_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded.transformer(*inputs), models.transformer(*inputs), atol=0, rtol=0)
    assert loaded.tokenizer.encode("a red seven", 4) == [2, 5, 3, 0]


def test_the_folder_holds_what_the_design_lists(run, tmp_path):
    export_run(run, tmp_path / "model")
    names = ["README.md", "config.json", "model.safetensors", "rqvae.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == names


def test_the_config_tells_step_weights_and_sampling(run, tmp_path):
    export_run(run, tmp_path / "model")
    info = read_info(tmp_path / "model")
    assert (info.step, info.weights) == (20, "param")
    assert info.sampling == SamplingConfig(top_k=5, top_p=0.9)


def test_a_step_can_be_chosen(run, models, tmp_path):
    export_run(run, tmp_path / "model", step=10)
    assert scale_of(tmp_path / "model", models) == pytest.approx(2)


def test_a_step_that_was_not_kept_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="step-00000010, step-00000020"):
        export_run(run, tmp_path / "model", step=11)


@pytest.mark.parametrize(("weights", "scale"), [(None, 3), ("ema", 3), ("param", 1)])
def test_the_moving_average_is_exported_unless_told_otherwise(averaged_run, models, tmp_path, weights, scale):
    export_run(averaged_run, tmp_path / "model", weights=weights)
    assert scale_of(tmp_path / "model", models) == pytest.approx(scale)


def test_a_moving_average_that_was_not_kept_is_missed(run, tmp_path):
    with pytest.raises(CheckpointError, match="no moving average"):
        export_run(run, tmp_path / "model", weights="ema")


def test_an_unknown_word_for_weights_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="--weights best"):
        export_run(run, tmp_path / "model", weights="best")


def test_bf16_parts_load_again(run, models, command, tmp_path):
    command([str(run), "--output", str(tmp_path / "model"), "--dtype", "bf16", "--part-gb", "0.00001"])
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    assert scale_of(tmp_path / "model", models) == pytest.approx(1, abs=0.01)


def test_a_run_whose_rqvae_was_exchanged_is_refused(averaged_run, build, tmp_path):
    for path in (averaged_run / "rqvae").iterdir():
        path.unlink()
    other = build().rqvae
    other.decoder.conv_out.bias.add_(1)
    save_rqvae(other, averaged_run / "rqvae")
    with pytest.raises(CheckpointError, match="was trained on codes of"):
        export_run(averaged_run, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_run_whose_rqvae_has_another_codebook_is_refused(run, build, tmp_path):
    for path in (run / "rqvae").iterdir():
        path.unlink()
    save_rqvae(build(codebook_size=9).rqvae, run / "rqvae")
    with pytest.raises(CheckpointError, match="codebook sizes"):
        export_run(run, tmp_path / "model")


def test_a_run_without_its_tokenizer_is_refused(run, tmp_path):
    (run / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither tokenizer.json nor tokenizer.model"):
        export_run(run, tmp_path / "model")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        export_run(tmp_path, tmp_path / "model")


def test_an_output_with_other_files_is_refused_and_kept(run, tmp_path):
    with pytest.raises(ConfigError, match="already holds"):
        export_run(run, run)
    assert (run / "checkpoints").is_dir()


def test_the_card_tells_limits_and_training(run, tmp_path):
    export_run(run, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    for part in ("## Intended use", "## Limits", "## License", "lr: 0.0005", "top-k 5, top-p 0.9", "after 20 steps"):
        assert part in card


def test_an_rqvae_run_is_exported_as_an_rqvae_folder(rqvae_run, models, command, tmp_path):
    command([str(rqvae_run), "--output", str(tmp_path / "rqvae")])
    assert fingerprint(load_rqvae(tmp_path / "rqvae")) == fingerprint(models.rqvae)


def test_an_rqvae_is_loaded_from_its_run(rqvae_run, models):
    assert fingerprint(load_rqvae(rqvae_run)) == fingerprint(models.rqvae)


def test_an_rqvae_cannot_be_loaded_from_the_run_of_a_transformer(run):
    with pytest.raises(CheckpointError, match="trained an rq-transformer, not an rq-vae"):
        load_rqvae(run)
