import pytest
import torch

from megarq.config.models import RQVAEConfig
from megarq.errors import CheckpointError, ConfigError
from megarq.rqvae.authors import config_from_authors, state_from_authors
from megarq.rqvae.model import RQVAE


def per_depth(authors_config: dict, authors_state: dict, sizes: list[int]) -> tuple[dict, dict]:
    """The reference checkpoint with a codebook of its own, of another size, for each depth."""
    authors_config["arch"]["hparams"] |= {"shared_codebook": False, "n_embed": sizes}
    for depth, size in enumerate(sizes):
        for name, rows in (("weight", size + 1), ("cluster_size_ema", size), ("embed_ema", size)):
            key = f"quantizer.codebooks.{depth}.{name}"
            authors_state[key] = authors_state[key][:rows] + depth
    return authors_config, authors_state


def test_config(authors_config: dict) -> None:
    assert config_from_authors(authors_config) == RQVAEConfig(
        resolution=32,
        channels=32,
        channel_multipliers=[1, 1, 2],
        res_blocks=1,
        attention_resolutions=[8],
        latent_channels=16,
        codebook_dim=16,
        codebook_size=64,
    )


def test_fields_that_only_training_reads(authors_config: dict) -> None:
    authors_config["arch"]["hparams"] |= {"decay": 0.9, "restart_unused_codes": False}
    authors_config["arch"]["ddconfig"]["dropout"] = 0.2
    config = config_from_authors(authors_config)
    assert (config.decay, config.restart_unused_codes, config.dropout) == (0.9, False, 0.2)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("ddconfig", {"double_z": True}, "double_z=True"),
        ("ddconfig", {"out_ch": 1}, "out_ch=1"),
        ("ddconfig", {"ch_mult": None}, "ch_mult is missing"),
        ("hparams", {"bottleneck_type": "vq"}, "bottleneck_type='vq'"),
        ("hparams", {"latent_shape": [16, 16, 16]}, r"latent_shape=\[16, 16, 16\]"),
        ("hparams", {"latent_shape": [8, 8, 32]}, "embed_dim=16"),
        ("hparams", {"latent_shape": [4, 4, 16], "code_shape": [4, 4, 4]}, r"code_shape=\[4, 4, 4\]"),
        ("hparams", {"code_shape": [8, 8]}, "expected three numbers"),
        ("hparams", {"decay": [0.99, 0.9, 0.9, 0.9]}, "share one decay"),
    ],
)
def test_config_that_cannot_be_imported_is_refused(
    authors_config: dict, section: str, change: dict, message: str
) -> None:
    authors_config["arch"][section] |= change
    with pytest.raises(CheckpointError, match=message):
        config_from_authors(authors_config)


def test_config_without_sections_is_refused() -> None:
    with pytest.raises(CheckpointError, match="arch is missing"):
        config_from_authors({"dataset": {}})


def test_sizes_per_depth_with_a_shared_codebook_are_refused(authors_config: dict) -> None:
    authors_config["arch"]["hparams"]["n_embed"] = [64, 32, 32, 32]
    with pytest.raises(ConfigError, match="a shared codebook has one size"):
        config_from_authors(authors_config)


def test_state_has_exactly_our_names(authors_config: dict, authors_state: dict) -> None:
    config = config_from_authors(authors_config)
    assert state_from_authors(authors_state, config).keys() == RQVAE(config).state_dict().keys()


def test_codebook_of_each_depth_is_kept(authors_config: dict, authors_state: dict) -> None:
    authors_config, authors_state = per_depth(authors_config, authors_state, [64, 32, 16, 8])
    config = config_from_authors(authors_config)
    model = RQVAE(config)
    model.load_state_dict(state_from_authors(authors_state, config))
    for depth, weight in enumerate(model.codebook_weights()):
        assert torch.equal(weight, authors_state[f"quantizer.codebooks.{depth}.weight"][:-1])


def test_discriminator_is_ignored(authors_config: dict, authors_state: dict) -> None:
    authors_state["discriminator.main.0.weight"] = torch.zeros(3)
    assert "discriminator.main.0.weight" not in state_from_authors(authors_state, config_from_authors(authors_config))


def test_half_precision_becomes_fp32(authors_config: dict, authors_state: dict) -> None:
    halves = {name: tensor.half() for name, tensor in authors_state.items()}
    state = state_from_authors(halves, config_from_authors(authors_config))
    assert state["encoder.conv_in.weight"].dtype == torch.float32


def test_missing_tensor_is_named(authors_config: dict, authors_state: dict) -> None:
    del authors_state["decoder.conv_out.bias"]
    with pytest.raises(CheckpointError, match=r"missing decoder\.conv_out\.bias"):
        state_from_authors(authors_state, config_from_authors(authors_config))


def test_unknown_tensor_is_named(authors_config: dict, authors_state: dict) -> None:
    authors_state["encoder.extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"unknown encoder\.extra"):
        state_from_authors(authors_state, config_from_authors(authors_config))


def test_wrong_shape_is_named(authors_config: dict, authors_state: dict) -> None:
    authors_state["quant_conv.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"quant_conv\.bias \[3\] instead of \[16\]"):
        state_from_authors(authors_state, config_from_authors(authors_config))


def test_copies_of_a_shared_codebook_must_agree(authors_config: dict, authors_state: dict) -> None:
    authors_state["quantizer.codebooks.2.weight"] = authors_state["quantizer.codebooks.2.weight"] + 1
    with pytest.raises(CheckpointError, match=r"differ from depth 0's: quantizer\.codebooks\.2\.weight"):
        state_from_authors(authors_state, config_from_authors(authors_config))
