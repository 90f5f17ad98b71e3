"""The authors' layout, written: theirs to ours and back, ours to theirs and back, to the last bit."""

import shlex
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from made_up_checkpoints import save_alone
from scripts import load_script

from megarq.checkpoint.format import Fragment
from megarq.config.run import RQTransformerRunConfig, RQVAELossConfig, RQVAERunConfig, SamplingConfig
from megarq.errors import CheckpointError, ConfigError
from megarq.inference.authors import import_pretrained
from megarq.inference.authors_export import export_authors
from megarq.inference.first_weights import read_first_weights
from megarq.inference.model_folder import model_fingerprint, read_info
from megarq.inference.pretrained import load_pretrained, load_rqvae, save_rqvae
from megarq.rqvae.model import RQVAE, fingerprint
from megarq.text.tokenizer import TextTokenizer


@pytest.fixture(scope="session")
def command():
    """tools/export.py's main."""
    return load_script("tools/export.py").main


def document(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def content(folder):
    return torch.load(folder / "model.pt", map_location="cpu", weights_only=True)


def same(ours, theirs):
    """Whether two state dicts have the same names, dtypes, shapes and bits."""
    assert ours.keys() == theirs.keys()
    return all(a.dtype == theirs[name].dtype and torch.equal(a, theirs[name]) for name, a in ours.items())


def publish(run, config, tensors, **kinds):
    fragments = {
        f"{kind}/{name}": (Fragment(tuple(tensor.shape)), tensor.detach().clone())
        for kind, named in {"param": tensors, **kinds}.items()
        for name, tensor in named.items()
    }
    save_alone(run, 7, fragments, {"architecture": config.architecture, "config": asdict(config)})


@pytest.fixture(scope="module")
def theirs(reference, tmp_path_factory):
    """A reference checkpoint imported, then written again."""
    folder = tmp_path_factory.mktemp("round")
    import_pretrained(reference.rqvae, folder / "ours", reference.rqtransformer)
    export_authors(folder / "ours", folder / "theirs")
    return folder / "theirs"


@pytest.mark.parametrize("part", ["rqvae", "rqtransformer"])
def test_a_reference_comes_back_to_the_last_bit(reference, theirs, part):
    original = getattr(reference, part)
    assert document(theirs / part) == document(original)
    assert content(theirs / part).keys() == content(original).keys() == {"state_dict"}
    assert same(content(theirs / part)["state_dict"], content(original)["state_dict"])


def test_every_variant_comes_back_to_the_last_bit(variant, export, tmp_path):
    export(variant, tmp_path / "ours")
    export_authors(tmp_path / "ours", tmp_path / "theirs")
    info = import_pretrained(tmp_path / "theirs" / "rqvae", tmp_path / "again", tmp_path / "theirs" / "rqtransformer")
    assert info.transformer == variant.transformer.config and info.rqvae_fingerprint == fingerprint(variant.rqvae)
    again = load_pretrained(tmp_path / "again")
    assert same(dict(again.transformer.named_parameters()), dict(variant.transformer.named_parameters()))
    assert same(again.rqvae.state_dict(), variant.rqvae.state_dict())


def test_a_shared_codebook_is_stored_once_for_each_depth(build, tmp_path):
    rqvae = build().rqvae
    save_rqvae(rqvae, tmp_path / "ours")
    export_authors(tmp_path / "ours", tmp_path / "theirs")
    state = content(tmp_path / "theirs")["state_dict"]
    size, depth = rqvae.config.codebook_size, rqvae.config.depth
    books = [state[f"quantizer.codebooks.{d}.weight"] for d in range(depth)]
    assert all(book.shape == (size + 1, rqvae.config.codebook_dim) and torch.equal(book, books[0]) for book in books)
    assert f"quantizer.codebooks.{depth}.weight" not in state and "quantizer.steps" not in state


def test_what_only_training_reads_comes_back(build, tmp_path):
    config = replace(build().rqvae.config, decay=0.9, restart_unused_codes=False, dropout=0.25)
    save_rqvae(RQVAE(config), tmp_path / "ours")
    export_authors(tmp_path / "ours", tmp_path / "theirs")
    import_pretrained(tmp_path / "theirs", tmp_path / "again")
    assert read_info(tmp_path / "again").rqvae == config


@pytest.fixture
def stage1_run(build, tmp_path):
    """A run of train_rqvae.py with a moving average (weights doubled) and a discriminator."""
    rqvae = build().rqvae
    config = RQVAERunConfig(model=rqvae.config, loss=RQVAELossConfig(reconstruction="l1", commitment_weight=0.5))
    weights = dict(rqvae.named_parameters())
    beside = {"discriminator.main.0.weight": torch.ones(2, 3, 4, 4), "discriminator.main.2.running_mean": torch.ones(4)}
    publish(
        tmp_path / "run",
        config,
        weights | {"discriminator.main.0.weight": beside["discriminator.main.0.weight"]},
        ema={name: 2 * tensor for name, tensor in weights.items()},
        buffer=dict(rqvae.named_buffers()) | {"discriminator.main.2.running_mean": torch.ones(4)},
    )
    return rqvae, tmp_path / "run"


@pytest.mark.parametrize(("weights", "scale"), [("param", 1.0), ("ema", 2.0), (None, 2.0)])
def test_a_run_of_stage_1_is_written(stage1_run, command, tmp_path, capsys, weights, scale):
    rqvae, run = stage1_run
    asked = [] if weights is None else ["--weights", weights]
    command([str(run), "--layout", "authors", "--output", str(tmp_path / "theirs"), *asked])
    theirs = tmp_path / "theirs"
    assert f"tools/import_pretrained.py --rqvae {theirs} --output MODEL" in capsys.readouterr().out
    import_pretrained(theirs, tmp_path / "again")
    again = load_rqvae(tmp_path / "again")
    assert torch.equal(again.quant_conv.weight, scale * rqvae.quant_conv.weight)
    assert torch.equal(again.quantizer.codebook(0).embed_ema, rqvae.quantizer.codebook(0).embed_ema)


def test_the_discriminator_of_a_run_is_written_and_read_back(stage1_run, tmp_path):
    export_authors(stage1_run[1], tmp_path / "theirs")
    found = read_first_weights(tmp_path / "theirs").discriminator
    assert content(tmp_path / "theirs").keys() == {"state_dict", "discriminator"}
    assert same(found, {"main.0.weight": torch.ones(2, 3, 4, 4), "main.2.running_mean": torch.ones(4)})


def test_the_loss_of_a_run_is_written(stage1_run, tmp_path):
    export_authors(stage1_run[1], tmp_path / "theirs")
    hparams = document(tmp_path / "theirs")["arch"]["hparams"]
    assert (hparams["loss_type"], hparams["latent_loss_weight"]) == ("l1", 0.5)


@pytest.fixture
def stage2_run(build, tokenizer_file, tmp_path):
    models = build()
    config = RQTransformerRunConfig(model=models.transformer.config, sampling=SamplingConfig(5, 0.9, guidance=3.0))
    publish(tmp_path / "run", config, dict(models.transformer.named_parameters()))
    save_rqvae(models.rqvae, tmp_path / "run" / "rqvae")
    TextTokenizer.load(tokenizer_file).save(tmp_path / "run")
    return models, tmp_path / "run"


def test_a_run_of_stage_2_is_written_with_its_tokenizer_and_sampling(
    stage2_run, command, tokenizer_file, tmp_path, capsys
):
    models, run = stage2_run
    theirs = tmp_path / "theirs"
    command([str(run), "--layout", "authors", "--output", str(theirs)])
    assert sorted(path.name for path in theirs.iterdir()) == ["rqtransformer", "rqvae", "tokenizer.json"]
    info = import_pretrained(theirs / "rqvae", tmp_path / "again", theirs / "rqtransformer", theirs / "tokenizer.json")
    assert asdict(info.sampling) == {"top_k": 5, "top_p": 0.9, "temperature": 1.0, "guidance": 3.0}
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("to read it back: python ")[2])
    load_script(words[0]).main([*words[1:-1], str(tmp_path / "typed")])
    assert model_fingerprint(tmp_path / "typed") == model_fingerprint(tmp_path / "again")
    again = load_pretrained(tmp_path / "again")
    assert same(dict(again.transformer.named_parameters()), dict(models.transformer.named_parameters()))
    assert again.tokenizer.vocab_size == TextTokenizer.load(tokenizer_file).vocab_size


def test_nothing_is_replaced(stage1_run, tmp_path):
    export_authors(stage1_run[1], tmp_path / "theirs")
    before = (tmp_path / "theirs" / "model.pt").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="theirs exists: this layout replaces nothing"):
        export_authors(stage1_run[1], tmp_path / "theirs")
    assert (tmp_path / "theirs" / "model.pt").stat().st_mtime_ns == before


def test_an_exported_model_has_no_steps_to_choose(build, export, tmp_path):
    export(build(), tmp_path / "ours")
    with pytest.raises(ConfigError, match=r"--step 3, --weights ema: .*ours is exported already"):
        export_authors(tmp_path / "ours", tmp_path / "theirs", step=3, weights="ema")


def test_a_full_disk_leaves_nothing(build, tmp_path, monkeypatch):
    save_rqvae(build().rqvae, tmp_path / "ours")

    def fail(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed\nmore")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match=r"model\.pt cannot be written \(PytorchStreamWriter failed"):
        export_authors(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
