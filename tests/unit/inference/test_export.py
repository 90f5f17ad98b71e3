"""Exporting runs: which weights, in which dtype, with which RQ-VAE and tokenizer."""

import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from made_up_checkpoints import cut, save_alone, save_together
from safetensors.torch import load_file
from scripts import load_script

from megarq.checkpoint.format import Fragment
from megarq.config.models import StackConfig
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
    return load_script("tools/export.py").main


def whole(tensors, kind):
    return {f"{kind}/{name}": (Fragment(tuple(tensor.shape)), tensor) for name, tensor in tensors.items()}


def publish(run, step, tensors, config, **metadata):
    metadata = {"architecture": config.architecture, "config": asdict(config)} | metadata
    save_alone(run, step, tensors, metadata)


@pytest.fixture(scope="module")
def models(build):
    return build()


@pytest.fixture
def run(models, tokenizer_file, tmp_path):
    """A run with checkpoints of steps 10 (weights doubled) and 20."""
    folder = tmp_path / "run"
    config = RQTransformerRunConfig(model=models.transformer.config, sampling=SamplingConfig(5, 0.9, guidance=3.0))
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
    assert info.sampling == SamplingConfig(top_k=5, top_p=0.9, guidance=3.0)


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
    sampling = "top-k 5, top-p 0.9, temperature 1.0 and guidance 3.0"
    for part in ("## Intended use", "## Limits", "## License", "lr: 0.0005", sampling, "after 20 steps"):
        assert part in card


def test_an_rqvae_run_is_exported_as_an_rqvae_folder(rqvae_run, models, command, tmp_path):
    command([str(rqvae_run), "--output", str(tmp_path / "rqvae")])
    assert fingerprint(load_rqvae(tmp_path / "rqvae")) == fingerprint(models.rqvae)


def test_an_rqvae_is_loaded_from_its_run(rqvae_run, models):
    assert fingerprint(load_rqvae(rqvae_run)) == fingerprint(models.rqvae)


def test_an_rqvae_cannot_be_loaded_from_the_run_of_a_transformer(run):
    with pytest.raises(CheckpointError, match="trained an rq-transformer, not an rq-vae"):
        load_rqvae(run)


PEAK = """
import sys
from pathlib import Path
import torch
from megarq.inference.export import DTYPES, export_run

torch.nn.Embedding(1, 1, device="meta")  # torch imports much of itself at its first meta tensor

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

run, output, dtype, part_bytes = sys.argv[1:]
before = status("VmRSS")
export_run(run, output, dtype=DTYPES[dtype], part_bytes=int(part_bytes))
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def large_run(build, tmp_path_factory):
    """A run of 303 MB, which 64 ranks under ZeRO-3 have written."""
    folder = tmp_path_factory.mktemp("large") / "run"
    stack = StackConfig(layers=3, heads=8)
    models = build(embed_dim=1024, body=stack, head=stack, cond_length=1, cond_vocab_size=5)
    held = [{} for _ in range(64)]
    for name, weight in models.transformer.named_parameters():
        for rank, piece in zip(held, cut(f"param/{name}", weight, 0, 1, 64), strict=True):
            rank |= piece
    config = RQTransformerRunConfig(model=models.transformer.config)
    save_together(folder, 1, held, {"architecture": config.architecture, "config": asdict(config)})
    save_rqvae(models.rqvae, folder / "rqvae")
    return folder, models


@pytest.mark.parametrize(
    ("dtype", "copies", "part_bytes"), [("fp32", 1.0, 10**9), ("bf16", 0.5, 10**9), ("bf16", 0.5, 5 * 10**7)]
)
def test_an_export_holds_one_part_of_the_model_at_a_time(large_run, tmp_path, dtype, copies, part_bytes):
    folder, models = large_run
    arguments = [str(folder), str(tmp_path / "model"), dtype, str(part_bytes)]
    given_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # a freed tensor leaves the process at once
    command = [sys.executable, "-c", PEAK, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=given_back)
    whole = sum(parameter.nbytes for parameter in models.transformer.parameters())
    largest = max(parameter.nbytes for parameter in models.transformer.parameters())
    allowed = min(whole * copies, part_bytes) + 4 * largest + 10e6
    assert int(done.stdout) < allowed < (1.3 if dtype == "fp32" else 0.8) * whole


def test_a_checkpoint_of_64_ranks_is_exported_exactly(large_run, tmp_path):
    folder, models = large_run
    export_run(folder, tmp_path / "model")
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in models.transformer.named_parameters())


def test_a_damaged_newest_checkpoint_is_passed_over(run, models, tmp_path, caplog):
    path = run / "checkpoints" / "step-00000020" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    export_run(run, tmp_path / "model")
    assert scale_of(tmp_path / "model", models) == pytest.approx(2)
    assert "step-00000020 is passed over" in caplog.text


def test_a_damaged_step_that_was_asked_for_is_refused(run, tmp_path):
    path = run / "checkpoints" / "step-00000020" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="were written"):
        export_run(run, tmp_path / "model", step=20)
