import pytest
import torch
from torch import Tensor

from megarq.config.models import RQVAEConfig
from megarq.errors import ConfigError, DataError
from megarq.rqvae.model import RQVAE, fingerprint


def counts(config: RQVAEConfig) -> tuple[int, int]:
    """Trainable parameters; and with the codebook of K + 1 rows."""
    with torch.device("meta"):
        model = RQVAE(config)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trainable, trainable + sum(book.weight.numel() for book in model.quantizer.codebooks)


def test_parameters_of_the_default_model() -> None:
    assert counts(RQVAEConfig()) == (100_207_491, 104_402_051)


def test_parameters_of_the_ffhq_model() -> None:
    assert counts(RQVAEConfig(attention_resolutions=[16], codebook_size=2048)) == (100_207_491, 100_732_035)


def test_parameters_are_those_of_the_convolutional_parts(tiny: RQVAE) -> None:
    parts = {name.split(".")[0] for name, _ in tiny.named_parameters()}
    assert parts == {"encoder", "quant_conv", "post_quant_conv", "decoder"}


def test_shapes(tiny: RQVAE, images: Tensor) -> None:
    tiny.eval()
    latents = tiny.encode(images)
    codes = tiny.quantize(latents)
    assert latents.shape == (5, 4, 4, 6)
    assert codes.shape == (5, 4, 4, 3) and codes.dtype == torch.int64
    assert tiny.embed(codes).shape == (5, 4, 4, 3, 6)
    assert tiny.decode(codes).shape == images.shape


def test_images_of_another_size_are_refused(tiny: RQVAE) -> None:
    with pytest.raises(DataError, match=r"\[1, 3, 16, 16\]"):
        tiny.encode(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("depth", [0, 4])
def test_depth_that_is_not_there_is_refused(tiny: RQVAE, depth: int) -> None:
    with pytest.raises(ConfigError, match="depths 1 to 3"):
        tiny.decode(torch.zeros(1, 4, 4, 3, dtype=torch.int64), depth=depth)


def test_training_step_reaches_every_parameter(tiny: RQVAE, images: Tensor) -> None:
    output = tiny.train()(images)
    (output.reconstruction.square().mean() + output.commitment_loss).backward()
    assert [name for name, parameter in tiny.named_parameters() if parameter.grad is None] == []


def test_bf16_model_trains_with_an_fp32_codebook(tiny: RQVAE, images: Tensor) -> None:
    tiny.to(torch.bfloat16).train()
    output = tiny(images.bfloat16())
    output.reconstruction.square().mean().backward()
    assert output.reconstruction.dtype == output.commitment_loss.dtype == torch.float32
    assert tiny.encoder.conv_in.weight.grad.dtype == torch.bfloat16
    assert tiny.codebook_weights().dtype == torch.float32


def test_shared_codebook_has_no_padding_row(tiny: RQVAE) -> None:
    assert tiny.codebook_weights().shape == (16, 6)


def test_codebooks_of_each_depth_have_no_padding_rows(tiny_config: RQVAEConfig) -> None:
    tiny_config.shared_codebook, tiny_config.codebook_sizes = False, [4, 8, 16]
    assert [list(weight.shape) for weight in RQVAE(tiny_config).codebook_weights()] == [[4, 6], [8, 6], [16, 6]]


def test_fingerprint_survives_saving_and_loading(tiny: RQVAE, tiny_config: RQVAEConfig, tmp_path) -> None:
    torch.save(tiny.state_dict(), tmp_path / "state.pt")
    loaded = RQVAE(tiny_config, seed=9)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert fingerprint(loaded) == fingerprint(tiny)


@pytest.mark.parametrize("name", ["encoder.conv_in.weight", "decoder.conv_out.bias", "quantizer.codebooks.0.weight"])
def test_fingerprint_changes_with_a_weight(tiny: RQVAE, name: str) -> None:
    before = fingerprint(tiny)
    tiny.state_dict()[name].view(-1)[0] += 1e-3
    assert fingerprint(tiny) != before
