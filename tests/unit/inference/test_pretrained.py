"""Model folders: what is written is what is read, and what a damaged or foreign folder answers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarq.errors import CheckpointError, ConfigError
from megarq.inference.model_card import model_card
from megarq.inference.model_folder import ModelInfo, new_folder, read_info
from megarq.inference.pretrained import load_pretrained, load_rqvae, save_rqvae
from megarq.rqvae.model import fingerprint


@pytest.fixture(scope="module")
def models(build):
    return build()


@pytest.fixture
def folder(models, export, tmp_path):
    return export(models, tmp_path / "model")


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_exported_model_answers_as_before(variant, export, tmp_path, random_inputs):
    codes, cond = random_inputs(variant.transformer.config)
    loaded = load_pretrained(export(variant, tmp_path / "model"))
    torch.testing.assert_close(loaded.transformer(codes, cond), variant.transformer(codes, cond), atol=0, rtol=0)
    torch.testing.assert_close(loaded.rqvae.decode(codes), variant.rqvae.decode(codes), atol=0, rtol=0)
    assert not loaded.transformer.training and not loaded.rqvae.training


def test_a_model_in_parts_answers_as_before(models, export, tmp_path, random_inputs):
    folder = export(models, tmp_path / "model", part_bytes=10_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    inputs = random_inputs(models.transformer.config)
    torch.testing.assert_close(
        load_pretrained(folder).transformer(*inputs), models.transformer(*inputs), atol=0, rtol=0
    )


def test_the_transformer_is_loaded_in_the_dtype_asked_for_and_the_rqvae_in_fp32(folder):
    loaded = load_pretrained(folder, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in loaded.transformer.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in loaded.rqvae.parameters()} == {torch.float32}
    assert torch.get_default_dtype() == torch.float32


def test_a_model_stored_in_bf16_is_half_as_large(models, export, tmp_path):
    sizes = [
        (export(models, tmp_path / str(dtype), dtype=dtype) / "model.safetensors").stat().st_size
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert sizes[1] < 0.6 * sizes[0]


def test_an_rqvae_folder_gives_the_rqvae_back(models, tmp_path, random_inputs):
    codes, _ = random_inputs(models.transformer.config)
    save_rqvae(models.rqvae, tmp_path)
    loaded = load_rqvae(tmp_path)
    torch.testing.assert_close(loaded.decode(codes), models.rqvae.decode(codes), atol=0, rtol=0)
    assert fingerprint(loaded) == read_info(tmp_path).rqvae_fingerprint


def test_an_exported_model_is_an_rqvae_folder_too(folder, models):
    assert fingerprint(load_rqvae(folder)) == fingerprint(models.rqvae)


def test_saving_the_same_rqvae_again_changes_nothing(models, tmp_path):
    save_rqvae(models.rqvae, tmp_path)
    before = (tmp_path / "rqvae.safetensors").stat().st_mtime_ns
    save_rqvae(models.rqvae, tmp_path)
    assert (tmp_path / "rqvae.safetensors").stat().st_mtime_ns == before


def test_a_folder_of_another_rqvae_is_not_overwritten(models, build, tmp_path):
    save_rqvae(build(codebook_size=9).rqvae, tmp_path)
    with pytest.raises(CheckpointError, match="already holds the RQ-VAE"):
        save_rqvae(models.rqvae, tmp_path)


def test_a_folder_without_rqvae_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no RQ-VAE"):
        load_rqvae(tmp_path)


def test_an_rqvae_folder_cannot_be_sampled_from(models, tmp_path):
    save_rqvae(models.rqvae, tmp_path)
    with pytest.raises(CheckpointError, match="RQ-VAE alone"):
        load_pretrained(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "rqvae.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "rqvae.safetensors"])
def test_a_truncated_file_is_called_damaged(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{name}.* damaged"):
        load_pretrained(folder)


def test_changed_rqvae_weights_do_not_have_their_fingerprint(folder):
    path = folder / "rqvae.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_out.bias"] += 1
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="fingerprint"):
        load_pretrained(folder)


def test_a_config_that_is_not_json_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 2}, "'megarq-model' version 2"),
        ({"format": "other"}, "'other' version 1"),
        ({"rqvae": None}, "lacks rqvae"),
        ({"rqvae": "x"}, "rqvae is 'x'"),
        ({"sampling": {"topk": 3}}, "topk"),
        ({"transformer": {"embed_dims": 3}}, "unknown key embed_dims.*embed_dim"),
        ({"transformer": {"embed_dim": "wide"}}, "embed_dim=wide"),
        ({"transformer": {"code_shape": [4, 4, 3]}}, "code shape"),
        ({"transformer": {"code_shape": [2, 2, 3], "codebook_size": 13}}, r"codebook sizes \[13, 13, 13\]"),
    ],
)
def test_a_config_of_another_format_or_model_is_refused(folder, values, message):
    change_config(folder, **values)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(folder)


def test_weights_of_another_shape_are_named(folder):
    fields = json.loads((folder / "config.json").read_text())["transformer"]
    change_config(folder, transformer=fields | {"embed_dim": 32})
    with pytest.raises(CheckpointError, match=r"is \[.*16.*\], not \[.*32.*\]"):
        load_pretrained(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(build, export, tmp_path):
    with pytest.raises(CheckpointError, match="the tokenizer has 8 tokens, the model 3"):
        load_pretrained(export(build(cond_vocab_size=3), tmp_path / "model"))


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_does_not_exist_is_refused(folder, device):
    with pytest.raises(ConfigError, match=device):
        load_pretrained(folder, device)


def test_a_dtype_without_fractions_is_refused(folder):
    with pytest.raises(ConfigError, match=r"torch.int64"):
        load_pretrained(folder, dtype=torch.int64)


def test_a_failed_export_leaves_the_earlier_one(folder):
    with pytest.raises(CheckpointError), new_folder(folder) as fresh:
        (fresh / "config.json").write_text("half")
        raise CheckpointError("disk full")
    assert read_info(folder).step == 3
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_new_export_replaces_the_earlier_one_whole(folder):
    with new_folder(folder) as fresh:
        (fresh / "README.md").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["README.md"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "000000.tar").write_text("precious")
    with pytest.raises(ConfigError, match=r"codes already holds 000000.tar"), new_folder(tmp_path / "codes"):
        pass
    assert (tmp_path / "codes" / "000000.tar").exists()


def test_the_card_of_an_rqvae_names_its_fingerprint(models):
    info = ModelInfo(models.rqvae.config, "f1nger")
    assert "f1nger" in model_card(info, "digits")
