"""Safetensors files: parts, strictness, and what a damaged file answers."""

import json
import subprocess

import pytest
import torch
from little_space import little_space

from megarq.errors import CheckpointError
from megarq.inference.tensor_files import read_tensors, write_tensors
from megarq.parallel.topology import TensorGroup


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{index}": torch.randn(4, 8, generator=generator) for index in range(5)}  # 128 bytes each


def write(folder, tensors, part_bytes=10**9):
    write_tensors(folder, "model", tensors, tensors.__getitem__, part_bytes)


def cut(tensor, dim):
    tensor.partition_dim = dim
    return tensor


def read(folder, tensors):
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    read_tensors(folder, "model", targets)
    return targets


@pytest.mark.parametrize(("part_bytes", "files"), [(10**9, 1), (300, 3), (1, 5)])
def test_parts_hold_all_tensors_within_the_limit(tmp_path, tensors, part_bytes, files):
    write(tmp_path, tensors, part_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    torch.testing.assert_close(read(tmp_path, tensors), tensors, atol=0, rtol=0)


def test_the_index_names_the_part_of_every_tensor(tmp_path, tensors):
    write(tmp_path, tensors, 300)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 128
    assert index["weight_map"]["layer.4"] == "model-00003-of-00003.safetensors"


def test_tensors_are_converted_to_the_dtype_asked_for(tmp_path, tensors):
    like = {name: tensor.to("meta", torch.bfloat16) for name, tensor in tensors.items()}
    write_tensors(tmp_path, "model", like, tensors.__getitem__)
    assert read(tmp_path, tensors)["layer.0"].equal(tensors["layer.0"].bfloat16().float())


def test_a_rank_reads_its_part_of_a_cut_tensor(tmp_path, tensors):
    write(tmp_path, tensors)
    for dim, shape in ((0, (2, 8)), (1, (4, 4))):
        targets = {name: cut(torch.zeros(shape), dim) for name in tensors}
        read_tensors(tmp_path, "model", targets, tp=TensorGroup(rank=1, size=2))
        assert all(torch.equal(targets[name], whole.chunk(2, dim)[1]) for name, whole in tensors.items())
    with pytest.raises(CheckpointError, match=r"layer.0 is \[4, 8\], not \[4, 16\]"):
        read_tensors(
            tmp_path,
            "model",
            {name: cut(tensor, 1) for name, tensor in tensors.items()},
            tp=TensorGroup(rank=1, size=2),
        )


def test_a_tensor_of_another_shape_is_not_written(tmp_path, tensors):
    with pytest.raises(CheckpointError, match=r"layer.0 is \[4, 8\], but the model needs \[2, 8\]"):
        write_tensors(tmp_path, "model", {"layer.0": torch.zeros(2, 8)}, tensors.__getitem__)


def test_a_failed_write_leaves_no_file(tmp_path, tensors):
    def failing(name):
        raise CheckpointError("no such tensor")

    with pytest.raises(CheckpointError, match="no such tensor"):
        write_tensors(tmp_path, "model", tensors, failing)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(tmp_path, tensors):
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing"):
        read(tmp_path, tensors)


def test_a_missing_part_is_named(tmp_path, tensors):
    write(tmp_path, tensors, 300)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003.safetensors"):
        read(tmp_path, tensors)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_called_damaged(tmp_path, tensors, kept):
    write(tmp_path, tensors)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="damaged"):
        read(tmp_path, tensors)


def test_a_truncated_part_is_called_damaged(tmp_path, tensors):
    write(tmp_path, tensors, 300)
    path = tmp_path / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"00002-of-00003.* damaged"):
        read(tmp_path, tensors)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(tmp_path, tensors, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index.json.* damaged"):
        read(tmp_path, tensors)


def test_missing_and_unknown_tensors_are_named(tmp_path, tensors):
    write(tmp_path, tensors)
    tensors["other"] = tensors.pop("layer.3")
    with pytest.raises(CheckpointError, match=r"missing other; unknown layer\.3"):
        read(tmp_path, tensors)


def test_a_tensor_of_another_shape_is_not_read(tmp_path, tensors):
    write(tmp_path, tensors)
    tensors["layer.1"] = torch.zeros(8, 4)
    with pytest.raises(CheckpointError, match=r"layer.1 is \[4, 8\], not \[8, 4\]"):
        read(tmp_path, tensors)


def test_a_full_disk_is_told_and_leaves_no_file(tmp_path, request):
    folder = tmp_path / "full"
    request.addfinalizer(lambda: subprocess.run(["umount", str(folder)], capture_output=True))
    with little_space(folder, size=32 * 1024):
        with pytest.raises(CheckpointError, match=r"model.safetensors cannot be written \(.*\). Free space"):
            write(folder, {"layer": torch.zeros(64, 1024)})
        assert not list(folder.iterdir())
