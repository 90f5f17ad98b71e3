"""An RQ-VAE to start from: every kind of folder, which weights, the architecture, what is not there."""

import shutil
from dataclasses import asdict, replace

import pytest
import torch
from made_up_checkpoints import save_alone

from megarq.checkpoint.format import Fragment
from megarq.config.models import RQVAEConfig
from megarq.config.run import RQVAERunConfig
from megarq.errors import CheckpointError, ConfigError
from megarq.inference.authors_export import export_authors
from megarq.inference.first_weights import check_same_architecture, read_architecture, read_first_weights
from megarq.inference.pretrained import save_rqvae
from megarq.rqvae.model import RQVAE, fingerprint


@pytest.fixture(scope="module")
def rqvae(build):
    """A trained one: moving averages and steps of its own."""
    model = RQVAE(build().rqvae.config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        model.quantizer.steps.fill_(900)
    return model


@pytest.fixture(scope="module")
def folders(rqvae, build, export, write_authors, tmp_path_factory):
    """The same RQ-VAE in every kind of folder; the run and the authors' have a moving average of doubled weights."""
    root = tmp_path_factory.mktemp("sources")
    save_rqvae(rqvae, root / "rqvae")
    models = build()
    export(models._replace(rqvae=rqvae), root / "exported")
    export_authors(root / "rqvae", root / "authors")
    doubled = {name: 2 * p.detach() for name, p in rqvae.named_parameters()}
    kinds = {"param": dict(rqvae.named_parameters()), "buffer": dict(rqvae.named_buffers()), "ema": doubled}
    tensors = {
        f"{kind}/{name}": (Fragment(tuple(t.shape)), t.detach())
        for kind, named in kinds.items()
        for name, t in named.items()
    }
    config = RQVAERunConfig(model=rqvae.config)
    save_alone(root / "run", 900, tensors, {"architecture": "rq-vae", "config": asdict(config)})
    content = torch.load(root / "authors" / "model.pt", weights_only=True)
    average = {name: 2 * t if name in doubled else t for name, t in content["state_dict"].items()}
    extra = {"state_dict_ema": average, "discriminator": {"main.0.bias": torch.ones(8)}, "epoch": 3}
    torch.save(content | extra, root / "authors" / "model.pt")
    return root


@pytest.mark.parametrize("kind", ["rqvae", "exported", "authors", "run"])
def test_weights_codebook_and_averages_are_taken_over(folders, rqvae, kind):
    first = read_first_weights(folders / kind, "param" if kind == "run" else None)
    expected = rqvae.state_dict() | {"quantizer.steps": torch.tensor(0)}
    assert first.config == rqvae.config == read_architecture(folders / kind)
    assert first.state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in first.state.items())
    assert str(folders / kind) in first.origin and fingerprint(rqvae)[:12] in first.origin


@pytest.mark.parametrize(
    ("kind", "weights", "scale"),
    [("run", None, 2), ("run", "ema", 2), ("run", "param", 1), ("authors", None, 1), ("authors", "ema", 2)],
)
def test_the_moving_average_is_taken_when_asked_for(folders, rqvae, kind, weights, scale):
    first = read_first_weights(folders / kind, weights)
    assert torch.equal(first.state["quant_conv.weight"], scale * rqvae.quant_conv.weight)
    assert torch.equal(first.state["quantizer.codebooks.0.weight"], rqvae.quantizer.codebook(0).weight)
    assert f"{'ema' if scale == 2 else 'param'} weights" in first.origin


def test_the_discriminator_comes_under_its_own_names(folders):
    found = read_first_weights(folders / "authors").discriminator
    assert found.keys() == {"main.0.bias"} and torch.equal(found["main.0.bias"], torch.ones(8))
    assert not read_first_weights(folders / "run").discriminator
    assert not read_first_weights(folders / "exported").discriminator


def wrapped(state):
    """As DistributedDataParallel names it."""
    return {f"module.{name}": tensor for name, tensor in state.items()}


def within(content):
    """The discriminator in the state dict, and another one in that of the averages."""
    ours, average = (
        {f"discriminator.{name}": factor * tensor for name, tensor in content["discriminator"].items()}
        for factor in (1, 2)
    )
    return {"state_dict": content["state_dict"] | ours, "state_dict_ema": content["state_dict_ema"] | average}


AS_SAVED = {
    "wrapped apart": lambda content: {
        name: wrapped(part) if isinstance(part, dict) else part for name, part in content.items()
    },
    "within": within,
    "wrapped together": lambda content: {name: wrapped(state) for name, state in within(content).items()},
    "wrapped within": lambda content: within(content | {"discriminator": wrapped(content["discriminator"])}),
}


@pytest.mark.parametrize("weights", ["param", "ema"])
@pytest.mark.parametrize("saved", AS_SAVED)
def test_the_authors_file_may_be_wrapped_and_hold_the_discriminator_anywhere(folders, tmp_path, saved, weights):
    shutil.copytree(folders / "authors", tmp_path / "saved")
    content = torch.load(tmp_path / "saved" / "model.pt", weights_only=True)
    torch.save(AS_SAVED[saved](content), tmp_path / "saved" / "model.pt")
    expected, found = (read_first_weights(folder, weights) for folder in (folders / "authors", tmp_path / "saved"))
    for name in ("state", "discriminator"):
        theirs, ours = getattr(expected, name), getattr(found, name)
        assert theirs and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_the_reference_can_be_trained_on(reference):
    first = read_first_weights(reference.rqvae)
    model = RQVAE(first.config)
    model.load_state_dict(first.state)
    assert torch.equal(model.eval().quantize(model.encode(reference.expected["images"])), reference.expected["codes"])


@pytest.mark.parametrize("kind", ["rqvae", "exported"])
def test_an_exported_model_has_one_set_of_weights(folders, kind):
    with pytest.raises(ConfigError, match="--init-weights ema: .* holds one set of weights. Leave it out"):
        read_first_weights(folders / kind, "ema")


def test_a_moving_average_that_is_not_there_is_missed(folders, reference):
    with pytest.raises(CheckpointError, match="has no 'state_dict_ema'"):
        read_first_weights(reference.rqvae, "ema")


@pytest.mark.parametrize("read", [read_first_weights, read_architecture])
def test_a_folder_of_none_of_them_is_refused(tmp_path, read):
    with pytest.raises(
        CheckpointError, match="--init-from .* holds neither config.json nor checkpoints nor config.yaml"
    ):
        read(tmp_path)


def test_a_run_of_stage_2_is_refused(tmp_path):
    tensors = {"param/x": (Fragment((1,)), torch.zeros(1))}
    save_alone(tmp_path / "run", 1, tensors, {"architecture": "rq-transformer", "config": {}})
    with pytest.raises(CheckpointError, match="trained an rq-transformer, not an rq-vae"):
        read_first_weights(tmp_path / "run")


def test_differing_keys_are_named():
    ours = RQVAEConfig(depth=8, attention_resolutions=[16])
    with pytest.raises(
        ConfigError,
        match=r"--init-from X is another RQ-VAE: model\.attention_resolutions=\[16\] \(\[8\] there\), "
        r"model\.depth=8 \(4 there\)\. Set these keys",
    ):
        check_same_architecture(ours, RQVAEConfig(), "X")


@pytest.mark.parametrize("change", [{"decay": 0.9}, {"restart_unused_codes": False}, {"dropout": 0.1}])
def test_what_is_about_training_alone_may_differ(change):
    check_same_architecture(replace(RQVAEConfig(), **change), RQVAEConfig(), "X")


def test_sizes_may_be_written_in_two_ways():
    check_same_architecture(
        RQVAEConfig(codebook_sizes=[16384] * 4, shared_codebook=False), RQVAEConfig(shared_codebook=False), "X"
    )
