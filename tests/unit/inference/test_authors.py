"""Importing checkpoints in the authors' layout: reference answers, every variant, and files that do not fit."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from scripts import load_script

from megarq.errors import CheckpointError, ConfigError
from megarq.inference.authors import import_pretrained
from megarq.inference.generator import ImageGenerator
from megarq.inference.model_folder import read_info
from megarq.inference.pretrained import load_pretrained, load_rqvae
from megarq.inference.sampling import Sampler
from megarq.rqvae.model import fingerprint

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
GELU = {"exact": "v1", "sigmoid": "v2"}


@pytest.fixture(scope="session")
def command():
    """tools/import_pretrained.py's main."""
    return load_script("tools/import_pretrained.py").main


def stack_document(stack):
    block = {
        "n_head": stack.heads,
        "gelu": GELU[stack.gelu],
        "attn_bias": stack.attention_bias,
        "mlp_bias": stack.mlp_bias,
    }
    return {"n_layer": stack.layers, "block": block}


def transformer_document(config):
    arch = {
        "type": "rq-transformer",
        "block_size": config.code_shape,
        "vocab_size": config.codebook_sizes or config.codebook_size,
        "embed_dim": config.embed_dim,
        "input_embed_dim": config.codebook_dim,
        "shared_tok_emb": config.shared_embedding,
        "shared_cls_emb": config.shared_classifier,
        "input_emb_vqvae": config.body_input == "codebook",
        "head_emb_vqvae": config.head_input == "codebook",
        "cumsum_depth_ctx": config.cumulative_depth,
        "vocab_size_cond": config.cond_vocab_size if config.condition != "none" else 0,
        "block_size_cond": config.cond_length if config.condition != "none" else 0,
        "body": stack_document(config.body),
        "head": stack_document(config.head),
    }
    return {"arch": arch}


def transformer_state(model):
    """Our tensors under the authors' names and in their shapes."""
    state = {}
    for name, tensor in model.state_dict().items():
        owner, _, rest = name.partition(".")
        if owner in ("body", "head"):
            number, _, rest = rest.partition(".")
            prefix = f"{owner}_transformer.blocks.{number}."
            if rest.startswith("attention.qkv."):
                kind = rest.rpartition(".")[2]
                for part, values in zip(("query", "key", "value"), tensor, strict=True):
                    state[f"{prefix}attn.{part}.{kind}"] = values
            else:
                rest = rest.replace("attention.output", "attn.proj").replace("mlp.up", "mlp.0")
                state[prefix + rest.replace("mlp.down", "mlp.2")] = tensor
        elif rest == "codes.weight" and owner != "outputs":
            state["tok_emb.weight"] = tensor
        elif rest.endswith("positions"):
            theirs = (
                {"condition_positions": "pos_emb_cond", "positions": "pos_emb_hw"}[rest]
                if owner == "body_input"
                else "pos_emb_d"
            )
            state[theirs] = tensor.unsqueeze(0)
        elif name == "body_input.condition.weight":
            state["cond_emb.weight"] = tensor
        elif rest.startswith("projection."):
            state[f"{'input' if owner == 'body_input' else 'head'}_mlp.{rest.removeprefix('projection.')}"] = tensor
        else:
            layer, _, rest = rest.partition(".")
            per_depth = layer == "codes" and rest == "linear.weight" and tensor.ndim == 3
            owner = {"codes": "classifier", "caption": "cond_classifier"}[layer]
            state[f"{owner}.{rest.replace('norm.', 'layer_norm.')}"] = tensor.transpose(1, 2) if per_depth else tensor
    learned = "tok_emb.weight" in state
    if learned and not model.config.shared_embedding:
        sizes = model.config.sizes
        state["tok_emb.offsets"] = torch.tensor([sum(sizes[:depth]) for depth in range(len(sizes))])
    return {name: tensor.clone() for name, tensor in state.items()}


def rqvae_document(config):
    height, width, depth = config.code_shape
    return {
        "arch": {
            "type": "rq-vae",
            "hparams": {
                "bottleneck_type": "rq",
                "embed_dim": config.codebook_dim,
                "n_embed": config.codebook_sizes or config.codebook_size,
                "latent_shape": [height, width, config.codebook_dim],
                "code_shape": [height, width, depth],
                "shared_codebook": config.shared_codebook,
            },
            "ddconfig": {
                "z_channels": config.latent_channels,
                "resolution": config.resolution,
                "in_channels": config.image_channels,
                "out_ch": config.image_channels,
                "ch": config.channels,
                "ch_mult": config.channel_multipliers,
                "num_res_blocks": config.res_blocks,
                "attn_resolutions": config.attention_resolutions,
            },
        }
    }


def rqvae_state(rqvae):
    """Our tensors, a shared codebook once per depth."""
    state = {}
    for name, tensor in rqvae.state_dict().items():
        if name.startswith("quantizer.codebooks.0.") and rqvae.config.shared_codebook:
            for depth in range(rqvae.config.depth):
                state[name.replace(".0.", f".{depth}.", 1)] = tensor.clone()
        elif name != "quantizer.steps":
            state[name] = tensor.clone()
    return state


@pytest.fixture
def write(write_authors, tmp_path):
    """Both folders of a pair of models, with changes to what the files hold."""

    def make(models, rqvae=None, rqtransformer=None, document=None):
        config = models.transformer.config
        content = {"state_dict": rqvae_state(models.rqvae)} | (rqvae or {})
        first = write_authors(tmp_path / "stage1", rqvae_document(models.rqvae.config), content)
        content = {"state_dict": transformer_state(models.transformer)} | (rqtransformer or {})
        return first, write_authors(tmp_path / "stage2", document or transformer_document(config), content)

    return make


@pytest.fixture(scope="module")
def models(build):
    return build()


@pytest.fixture(scope="module")
def imported(reference, command, tmp_path_factory):
    """The reference model, imported by the command line."""
    output = tmp_path_factory.mktemp("imported") / "model"
    command(["--rqvae", str(reference.rqvae), "--rqtransformer", str(reference.rqtransformer), "--output", str(output)])
    return ImageGenerator.from_pretrained(output)


def test_greedy_codes_are_the_references(imported, reference):
    codes = imported.sample_codes(reference.expected["cond"], top_k=1, top_p=1.0, temperature=1.0, seed=0)
    assert torch.equal(codes, reference.expected["greedy_codes"])


def test_greedy_pictures_are_the_references(imported, reference):
    images = imported.rqvae.decode(reference.expected["greedy_codes"])
    torch.testing.assert_close(images, reference.expected["greedy_images"], **TOLERANCE)


def test_logits_are_the_references(imported, reference):
    expected = reference.expected
    logits, cond_logits = imported.transformer(expected["codes"], expected["cond"])
    torch.testing.assert_close(logits, expected["logits"], **TOLERANCE)
    assert (cond_logits is None) == ("cond_logits" not in expected)
    if cond_logits is not None:
        torch.testing.assert_close(cond_logits, expected["cond_logits"], **TOLERANCE)


def test_cached_logits_are_the_references_at_every_step(imported, reference):
    codes, cond = reference.expected["codes"], reference.expected["cond"]
    seen = []

    def choose(logits, position, depth):
        seen.append(logits)
        return codes.flatten(1, 2)[:, position, depth]

    Sampler(imported.transformer, len(cond), choose).draw(cond)
    torch.testing.assert_close(torch.stack(seen, dim=1), reference.expected["logits"].flatten(1, 3), **TOLERANCE)


def test_the_rqvae_answers_as_the_reference(imported, reference):
    expected = reference.expected
    latents = imported.rqvae.encode(expected["images"])
    torch.testing.assert_close(latents, expected["latents"], **TOLERANCE)
    assert torch.equal(imported.rqvae.quantize(latents), expected["codes"])
    soft = imported.rqvae.soft_codes(latents, temperature=0.5)
    torch.testing.assert_close(soft, expected["soft_codes"].float(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        imported.rqvae.decode(expected["codes"], depth=2), expected["decoded_first_2"], **TOLERANCE
    )


def test_every_variant_imports_with_identical_logits(variant, write, command, tmp_path, random_inputs):
    first, second = write(variant)
    output = tmp_path / "model"
    command(["--rqvae", str(first), "--rqtransformer", str(second), "--output", str(output)])
    codes, cond = random_inputs(variant.transformer.config)
    loaded = load_pretrained(output)
    torch.testing.assert_close(loaded.transformer(codes, cond), variant.transformer(codes, cond), atol=0, rtol=0)


def test_vocab_size_may_stand_under_dataset(models, write, tmp_path):
    document = transformer_document(models.transformer.config)
    document["dataset"] = {"vocab_size": document["arch"].pop("vocab_size")}
    info = import_pretrained(*_swap(write(models, document=document), tmp_path))
    assert info.transformer.codebook_size == 12


def _swap(folders, tmp_path, name="model"):
    return folders[0], tmp_path / name, folders[1]


def test_what_else_a_file_holds_is_ignored(models, write, tmp_path):
    extra = {"discriminator": {"main.0.weight": torch.zeros(3)}, "epoch": 4, "optimizer": {"lr": 0.1}}
    info = import_pretrained(*_swap(write(models, rqvae=extra, rqtransformer={"epoch": 3}), tmp_path))
    assert info.rqvae_fingerprint == fingerprint(models.rqvae)


@pytest.mark.parametrize(
    ("weights", "scale", "found"), [(None, 1.0, "param"), ("ema", 2.0, "ema"), ("param", 1.0, "param")]
)
def test_the_moving_average_is_taken_when_asked_for(models, write, tmp_path, weights, scale, found):
    average = {"state_dict_ema": {name: 2 * tensor for name, tensor in transformer_state(models.transformer).items()}}
    first, second = write(models, rqtransformer=average)
    if weights == "ema":
        (tmp_path / "stage1" / "model.pt").unlink()
        torch.save({"state_dict": {}, "state_dict_ema": rqvae_state(models.rqvae)}, first / "model.pt")
    info = import_pretrained(first, tmp_path / "model", second, weights=weights)
    loaded = load_pretrained(tmp_path / "model").transformer
    torch.testing.assert_close(loaded.body_input.positions, scale * models.transformer.body_input.positions)
    assert info.weights == found


def test_a_moving_average_that_is_not_there_is_missed(models, write, tmp_path):
    with pytest.raises(CheckpointError, match="has no 'state_dict_ema', only 'state_dict': use --weights param"):
        import_pretrained(*_swap(write(models), tmp_path), weights="ema")


def test_the_only_checkpoint_is_found_under_any_name(models, write, tmp_path):
    first, second = write(models)
    (second / "model.pt").rename(second / "epoch100_model.pt")
    assert import_pretrained(first, tmp_path / "model", second).transformer is not None


def test_two_checkpoints_are_ambiguous(models, write, tmp_path):
    first, second = write(models)
    (second / "model.pt").rename(second / "a.pt")
    (second / "b.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"a.pt, b.pt: leave one"):
        import_pretrained(first, tmp_path / "model", second)


def test_an_rqvae_can_be_imported_alone(models, write, command, tmp_path):
    first, _ = write(models)
    command(["--rqvae", str(first), "--output", str(tmp_path / "model")])
    assert fingerprint(load_rqvae(tmp_path / "model")) == fingerprint(models.rqvae)


def test_a_tokenizer_is_copied(models, write, command, tokenizer_file, tmp_path):
    first, second = write(models)
    command(
        [
            "--rqvae",
            str(first),
            "--rqtransformer",
            str(second),
            "--tokenizer",
            str(tokenizer_file),
            "--output",
            str(tmp_path / "m"),
        ]
    )
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()
    assert load_pretrained(tmp_path / "m").tokenizer.vocab_size == 8


def test_a_tokenizer_of_a_class_model_is_refused(build, write, tokenizer_file, tmp_path):
    first, second = write(build(cond_length=1, cond_vocab_size=5))
    with pytest.raises(ConfigError, match="this model's condition is class"):
        import_pretrained(first, tmp_path / "model", second, tokenizer_file)


def test_their_sampling_settings_become_the_models(models, write, tmp_path):
    document = transformer_document(models.transformer.config)
    document["sampling"] = {"top_k": [9, 5, 3], "top_p": [0.9, 0.9, 0.9], "temp": 1.1}
    import_pretrained(*_swap(write(models, document=document), tmp_path))
    assert asdict(read_info(tmp_path / "model").sampling) == {
        "top_k": [9, 5, 3],
        "top_p": 0.9,
        "temperature": 1.1,
        "guidance": 1.0,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"codebook_size": 13}, "codebook sizes"), ({"codebook_dim": 16}, "codebook vectors' length")],
)
def test_models_that_were_not_trained_together_are_refused(
    models, build, write, write_authors, tmp_path, changes, message
):
    first, _ = write(models)
    other = build(**changes).transformer
    second = write_authors(
        tmp_path / "other", transformer_document(other.config), {"state_dict": transformer_state(other)}
    )
    with pytest.raises(CheckpointError, match=message):
        import_pretrained(first, tmp_path / "model", second)
    assert not (tmp_path / "model").exists()


def test_a_missing_tensor_is_named(models, write, tmp_path):
    state = transformer_state(models.transformer)
    del state["body_transformer.blocks.1.attn.key.weight"]
    with pytest.raises(CheckpointError, match=r"missing body.1.attention.qkv.weight"):
        import_pretrained(*_swap(write(models, rqtransformer={"state_dict": state}), tmp_path))


def test_a_missing_config_is_named(models, write, tmp_path):
    first, second = write(models)
    (second / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"stage2/config.yaml is missing"):
        import_pretrained(first, tmp_path / "model", second)


def test_a_folder_of_a_whole_model_names_the_one_that_has_a_config(models, write, tmp_path):
    first, second = write(models)
    (second / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=rf"config.yaml is missing: give the .* There is {first}\.$"):
        import_pretrained(first.parent, tmp_path / "model")


@pytest.mark.parametrize("text", ["a: [", "just words", "model: {}"])
def test_a_config_that_describes_no_model_is_named(models, write, tmp_path, text):
    first, second = write(models)
    (second / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.yaml"):
        import_pretrained(first, tmp_path / "model", second)


@pytest.mark.parametrize("kept", [0, 10, 3000])
def test_a_truncated_checkpoint_is_named(models, write, tmp_path, kept):
    first, second = write(models)
    (second / "model.pt").write_bytes((second / "model.pt").read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model.pt cannot be read"):
        import_pretrained(first, tmp_path / "model", second)


def test_a_checkpoint_that_holds_code_is_not_run(models, write, tmp_path):
    first, second = write(models)
    torch.save({"state_dict": {}, "path": Path("x")}, second / "model.pt")
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        import_pretrained(first, tmp_path / "model", second)


@pytest.mark.parametrize("content", [[1, 2], {"weights": {}}])
def test_a_file_without_state_dict_is_refused(models, write, tmp_path, content):
    first, second = write(models)
    torch.save(content, second / "model.pt")
    with pytest.raises(CheckpointError, match="state_dict"):
        import_pretrained(first, tmp_path / "model", second)


def test_an_rqvae_in_the_transformers_place_is_refused(models, write, tmp_path):
    first, _ = write(models)
    with pytest.raises(CheckpointError, match="rq-transformer"):
        import_pretrained(first, tmp_path / "model", first)


def test_the_imported_configuration_is_in_the_card(models, write, tmp_path):
    import_pretrained(*_swap(write(models), tmp_path))
    card = (tmp_path / "model" / "README.md").read_text()
    assert yaml.safe_load("\n".join(card.partition("## Configuration")[2].splitlines()))["model"]["embed_dim"] == 16
