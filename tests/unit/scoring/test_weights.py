import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from megarq.errors import CheckpointError, ConfigError
from megarq.scoring import weights as module
from megarq.scoring.networks import build_network
from megarq.scoring.protocols import PROTOCOLS
from megarq.scoring.weights import NETWORKS, Weights, find_weights, parse_weights, read_state

CPU = torch.device("cpu")
PUBLISHED = NETWORKS["inception"].files[0]


class Opened:
    """Its unpickling would run code."""

    def __reduce__(self):
        return (print, ("code ran",))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's cache, empty; the hub's has nothing."""
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(module.torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(module, "try_to_load_from_cache", lambda *_: None)
    return tmp_path / "hub" / "checkpoints"


def test_options_name_networks_and_a_bare_file_is_inceptions():
    given = parse_weights(["a/x=y.pth", "clip=clip.safetensors"])
    assert given == {"inception": Path("a/x=y.pth"), "clip": Path("clip.safetensors")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lpips=a.pth"], "--feature-weights lpips=a.pth: no network 'lpips'. Known: inception, vgg16, clip"),
        (["a.pth", "inception=b.pth"], "gives inception twice: a.pth and b.pth. Leave one out."),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        parse_weights(options)


def test_a_file_that_is_given_is_taken(tmp_path, cache):
    torch.save({"a": torch.zeros(1)}, tmp_path / "mine.pth")
    found = find_weights("inception", {"inception": tmp_path / "mine.pth"})
    assert found.sha256 == hashlib.sha256((tmp_path / "mine.pth").read_bytes()).hexdigest() and not found.published
    with pytest.raises(
        CheckpointError, match=r"none\.pth, weights of clip: no such file. Give --feature-weights clip="
    ):
        find_weights("clip", tmp_path / "none.pth")


@pytest.mark.parametrize("network", list(NETWORKS))
def test_a_missing_file_is_asked_for_by_its_published_name(cache, network):
    known = NETWORKS[network]
    with pytest.raises(CheckpointError, match=f"no weights of {network} in .*: Give|no weights of {network}") as caught:
        find_weights(network)
    message = str(caught.value)
    assert known.files[0] in message and known.address in message and str(cache) in message
    assert all(f"sha256 {known[:12]}.." in message.replace(" or ", ", sha256 ") for known in known.sha256)


def test_torchs_cache_is_searched_and_its_files_are_checked(cache, monkeypatch):
    torch.save({"a": torch.zeros(1)}, cache / PUBLISHED)
    with pytest.raises(CheckpointError, match=r"has sha256 .*, not 6726825d..: it is damaged. Copy it there again."):
        find_weights("inception")
    prefix = hashlib.sha256((cache / PUBLISHED).read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(NETWORKS, "inception", replace(NETWORKS["inception"], sha256=(prefix,)))
    assert find_weights("inception").path == cache / PUBLISHED


def test_the_hubs_cache_is_searched(cache, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        module, "try_to_load_from_cache", lambda *names: asked.append(names) or str(tmp_path / "clip.safetensors")
    )
    assert find_weights("clip").path == tmp_path / "clip.safetensors"
    assert asked == [("timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors")]


def test_tensors_are_read_from_safetensors_and_from_within_a_checkpoint(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        assert torch.equal(read_state(tmp_path / name)["a"], torch.ones(2))


def test_code_in_a_file_is_not_run(tmp_path, capfd):
    torch.save({"a": Opened()}, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match="cannot be read as plain tensors .*Copy it again, or save its state_dict"
    ):
        read_state(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        build_network("inception", PROTOCOLS["clean"], ["2048"], Weights("inception", tmp_path / "a.pth"), CPU)
    assert "code ran" not in capfd.readouterr().out


def test_a_torchscript_archive_is_refused_with_the_way_out(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match="is a TorchScript archive, which holds code. Save its tensors where"):
        read_state(tmp_path / "clip.pt")


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {}])
def test_a_file_of_other_things_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds a .*, not named tensors. Save the network's state_dict."):
        read_state(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        read_state(tmp_path / "b.pth")


def test_a_file_of_another_network_is_refused_with_its_keys(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        build_network("inception", PROTOCOLS["clean"], ["2048"], Weights("inception", tmp_path / "a.pth"), CPU)
    message = str(caught.value)
    assert 'is no file of inception (Missing key(s) in state_dict: "Conv2d_1a_3x3.conv.weight", ' in message
    assert re.search(r'" and \d+ more; Unexpected key\(s\) in state_dict: "weight", "bias"\)', message)
    assert "Give --feature-weights FILE: weights-inception-2015-12-05-6726825d.pth, sha256 6726825d.." in message
    assert len(message) < 700


def test_every_published_network_has_a_checksum():
    for name in ("inception", "vgg16", "clip", "dinov2", "resnet101"):
        sha256 = NETWORKS[name].sha256
        assert sha256 and all(re.fullmatch("[0-9a-f]{8,64}", begin) for begin in sha256), name


@pytest.mark.parametrize(
    ("network", "name", "said"),
    [
        ("clip", "open_clip_model.safetensors", ["not e6d1bd7789aa..: scores cannot be held against published ones."]),
        ("dinov2", "dinov2_vitl14_pretrain.pth", ["not d5383ea8f487..: scores cannot be held against"]),
        ("resnet101", "mine.pth", ["not 63fe2227.. or cd907fc2..: scores cannot"]),
        ("dinov2", "model.safetensors", []),  # timm's, of which no checksum is known
    ],
)
def test_a_file_of_another_checksum_has_a_note(tmp_path, network, name, said):
    (tmp_path / name).write_bytes(b"another")
    notes = Weights(network, tmp_path / name).notes
    assert len(notes) == len(said) and all(part in note for part, note in zip(said, notes, strict=True))


def test_weights_that_are_not_the_published_ones_are_told(inception_file):
    built = build_network("inception", PROTOCOLS["rq-paper"], ["2048"], Weights("inception", inception_file), CPU)
    assert len(built.notes) == 1 and "not 6726825d..: scores cannot be held against published ones." in built.notes[0]
    assert built.dim == 2048
