"""Fragments put together again, and every way in which a checkpoint can be damaged."""

import json
import math
import os
from itertools import product
from pathlib import Path

import pytest
import torch
from made_up_checkpoints import cut
from safetensors import safe_open
from torch import Tensor

from megarq.checkpoint import format
from megarq.checkpoint.format import METADATA, VERSION, Checkpoint, Fragment, write_rank_file
from megarq.checkpoint.rank_file import OpenFiles
from megarq.errors import CheckpointError


def save(folder: Path, ranks: list[dict[str, tuple[Fragment, Tensor]]]) -> Checkpoint:
    """A checkpoint whose files hold these fragments."""
    folder.mkdir(exist_ok=True)
    files = [write_rank_file(folder, rank, tensors) for rank, tensors in enumerate(ranks)]
    document = {"format": "megarq-checkpoint", "version": VERSION, "step": 1, "files": files}
    (folder / METADATA).write_text(json.dumps(document))
    return Checkpoint.open(folder)


def edit_metadata(step: Path, **changes: object) -> None:
    path = step / METADATA
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("pieces", [1, 2, 5])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_fragments_of_every_cut_are_the_whole(tmp_path, dim, parts, pieces):
    whole = torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(save(tmp_path, cut("param/w", whole, dim, parts, pieces)).tensor("w"), whole)


def test_the_order_of_files_does_not_matter(tmp_path):
    whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(save(tmp_path, cut("param/w", whole, 1, 2, 3)[::-1]).tensor("w"), whole)


def test_the_worked_example(tmp_path):
    whole = torch.arange(24.0).reshape(6, 4)
    numbers = save(tmp_path, cut("param/w", whole, 0, 3, 2)).read("w", "param", Fragment((6, 4), 0, 0, 2, 6), 6)
    assert torch.equal(numbers, whole.flatten()[6:12])


LAYOUTS = [(parts, pieces) for parts in (1, 2, 3, 6) for pieces in (1, 3, 7)]
"""Tensor-parallel and data-parallel sizes."""


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_every_layout_reads_what_any_other_wrote(tmp_path, monkeypatch, dim):
    """Each fragment of one layout out of a checkpoint of another, against the same fragment cut from the whole."""
    shape = [3, 5, 2]
    shape[dim] = 6
    whole = torch.arange(math.prod(shape)).view(shape)
    for stored in LAYOUTS:
        checkpoint = save(tmp_path / "-".join(map(str, stored)), cut("param/w", whole, dim, *stored))
        for wanted, at_once in product(LAYOUTS, [1, 10, 2**18]):
            monkeypatch.setattr(format, "_BUFFER", at_once)
            for held in cut("param/w", whole, dim, *wanted):
                for place, expected in held.values():
                    numbers = checkpoint.read("w", "param", place, expected.numel())
                    assert torch.equal(numbers, expected), (stored, wanted, place)


@pytest.mark.parametrize(
    ("wanted", "count"), [(Fragment((8, 512), 1, 3, 4), 1024), (Fragment((8, 512), start=700), 90)]
)
def test_only_the_bytes_wanted_are_read(tmp_path, monkeypatch, wanted, count):
    checkpoint = save(tmp_path, cut("param/w", torch.zeros(8, 512), 1, 2, 2))
    monkeypatch.setattr(format, "_BUFFER", 1)
    read = []
    monkeypatch.setattr(format, "read_numbers", lambda file, stored, start, into: read.append(into.fill_(1).numel()))
    checkpoint.read("w", "param", wanted, count)
    assert sum(read) == count


def test_files_without_a_wanted_number_are_not_opened(tmp_path):
    checkpoint = save(tmp_path, cut("param/w", torch.ones(8, 4), 0, 2, 2))
    for rank in (0, 1, 3):
        (tmp_path / f"rank-{rank:05d}.safetensors").unlink()
    assert checkpoint.read("w", "param", Fragment((8, 4), 0, 2, 4), 8).tolist() == [1.0] * 8


def test_a_limited_number_of_files_is_open(tmp_path):
    whole = torch.arange(64.0)
    checkpoint = save(tmp_path, cut("param/w", whole, 0, 1, 8))
    checkpoint._files = OpenFiles(limit=3)
    for _ in range(2):
        assert torch.equal(checkpoint.tensor("w"), whole)
        assert len(checkpoint._files._files) == 3
    checkpoint.close()
    assert not checkpoint._files._files


@pytest.mark.parametrize("place", [Fragment((3, 8)), Fragment((6, 4), 1, 0, 2)])
def test_a_tensor_of_another_shape_or_cut_is_refused(tmp_path, place):
    checkpoint = save(tmp_path, cut("param/w", torch.ones(6, 4), 0, 2, 1))
    with pytest.raises(CheckpointError, match=r"shape \[6, 4\], cut along 0, the model's is \[.*Resume with"):
        checkpoint.read("w", "param", place, 12)


def test_the_files_are_safetensors(tmp_path):
    """Of mixed types, so that a file which is not aligned would be noticed."""
    tensors = {"a": torch.ones(3, dtype=torch.bool), "b": torch.arange(3.0), "c": torch.tensor(7)}
    save(tmp_path, [{f"buffer/{name}": (Fragment(tuple(t.shape)), t) for name, t in tensors.items()}])
    with safe_open(tmp_path / "rank-00000.safetensors", "pt") as file:
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(f"buffer/{name}"), tensor.flatten())


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    checkpoint = save(tmp_path, cut("param/w", torch.ones(4, 6), 0, 1, 1))
    os.truncate(tmp_path / "rank-00000.safetensors", (tmp_path / "rank-00000.safetensors").stat().st_size - 4)
    with pytest.raises(CheckpointError, match="ends at byte"):
        checkpoint.tensor("w")


def test_a_scalar_and_an_empty_tensor(tmp_path):
    tensors = {
        "buffer/count": (Fragment(()), torch.tensor(7)),
        "buffer/none": (Fragment((0, 3)), torch.empty(0, 3)),
    }
    checkpoint = save(tmp_path, [tensors])
    assert checkpoint.tensor("count", "buffer").item() == 7
    assert checkpoint.tensor("none", "buffer").shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_types_are_kept(tmp_path, dtype):
    values = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    checkpoint = save(tmp_path, [{"buffer/b": (Fragment((2, 2)), values)}])
    assert torch.equal(checkpoint.tensor("b", "buffer"), values)


def test_names_are_those_of_a_kind(tmp_path):
    keys = ("param/b", "param/a.weight", "ema/a.weight")
    checkpoint = save(tmp_path, [{key: (Fragment((1,)), torch.ones(1)) for key in keys}])
    assert checkpoint.names() == ["a.weight", "b"]
    assert checkpoint.names("ema") == ["a.weight"]
    assert checkpoint.names("buffer") == []


def test_an_unknown_tensor_is_refused(step):
    with pytest.raises(CheckpointError, match="holds no param of foreign: use a checkpoint of this model"):
        Checkpoint.open(step).tensor("foreign")


def test_missing_numbers_are_refused(tmp_path):
    checkpoint = save(tmp_path, cut("param/w", torch.ones(4, 6), 0, 2, 2)[:-1])
    with pytest.raises(CheckpointError, match="param of w has 18 of 24 numbers. The checkpoint is damaged"):
        checkpoint.tensor("w")


def test_metadata_is_that_which_was_published(tmp_path, publish):
    folder = publish(tmp_path, 12, architecture="rq-transformer")
    metadata = Checkpoint.open(folder).metadata
    assert (metadata["step"], metadata["architecture"]) == (12, "rq-transformer")


def test_a_folder_without_metadata_is_refused(step):
    (step / METADATA).unlink()
    with pytest.raises(CheckpointError, match=r"has no metadata.json: the checkpoint was never finished"):
        Checkpoint.open(step)


@pytest.mark.parametrize("content", [b'{"format": "megarq-ch', b"\xff\xfe", b"[]", b"null"])
def test_damaged_metadata_is_refused(step, content):
    (step / METADATA).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"metadata.json is not .*: the checkpoint is damaged"):
        Checkpoint.open(step)


@pytest.mark.parametrize("changes", [{"format": "pytorch"}, {"version": VERSION + 1}, {"format": None}])
def test_another_format_is_refused(step, changes):
    edit_metadata(step, **changes)
    with pytest.raises(CheckpointError, match="this release reads megarq-checkpoint version"):
        Checkpoint.open(step)


def test_metadata_without_files_is_refused(step):
    metadata = json.loads((step / METADATA).read_text())
    del metadata["files"]
    (step / METADATA).write_text(json.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"metadata.json .*damaged"):
        Checkpoint.open(step)


def test_a_missing_rank_file_is_refused(step):
    (step / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors is missing, \d+ bytes were written"):
        Checkpoint.open(step)


def test_a_rank_file_cut_short_is_refused(step):
    path = step / "rank-00000.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=f"has {len(content) - 10} bytes, {len(content)} bytes were written"):
        Checkpoint.open(step)


def test_a_rank_file_with_a_broken_header_is_refused(step):
    path = step / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = bytes(32)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors cannot be read .*: the checkpoint is damaged"):
        Checkpoint.open(step)


def test_a_rank_file_of_another_program_is_refused(step):
    from safetensors.torch import save_file

    path = step / "rank-00000.safetensors"
    save_file({"x": torch.ones(1)}, path)
    entry = {"name": path.name, "bytes": path.stat().st_size, "sha256": ""}
    edit_metadata(step, files=[entry])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint.open(step)


def test_changed_numbers_are_found_by_verification(step):
    path = step / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors has the sha256 .*damaged"):
        Checkpoint.open(step).verify()


def test_verification_passes_a_whole_checkpoint(step):
    Checkpoint.open(step).verify()
