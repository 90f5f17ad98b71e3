"""Fragments put together again, and every way in which a checkpoint can be damaged."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megarq.checkpoint.format import METADATA, VERSION, Checkpoint, Fragment, write_rank_file
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


def cut(whole: Tensor, dim: int, parts: int, pieces: int) -> list[dict[str, tuple[Fragment, Tensor]]]:
    """One file for each piece of each tensor-parallel slice, as ZeRO writes them."""
    ranks = []
    for part in range(parts):
        flat = whole.chunk(parts, dim)[part].reshape(-1)
        size = math.ceil(flat.numel() / pieces)
        for piece in range(pieces):
            numbers = flat[piece * size : (piece + 1) * size]
            ranks.append({"param/w": (Fragment(tuple(whole.shape), dim, part, parts, piece * size), numbers)})
    return ranks


@pytest.mark.parametrize("pieces", [1, 2, 5])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_fragments_of_every_cut_are_the_whole(tmp_path, dim, parts, pieces):
    whole = torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(save(tmp_path, cut(whole, dim, parts, pieces)).tensor("w"), whole)


def test_the_order_of_files_does_not_matter(tmp_path):
    whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(save(tmp_path, cut(whole, 1, 2, 3)[::-1]).tensor("w"), whole)


def test_the_worked_example(tmp_path):
    whole = torch.arange(24.0).reshape(6, 4)
    piece = Fragment((6, 4), dim=0, part=0, parts=2, start=6)
    assert torch.equal(piece.slice_of(whole).reshape(-1)[piece.start :], whole.flatten()[6:12])


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
    checkpoint = save(tmp_path, cut(torch.ones(4, 6), 0, 2, 2)[:-1])
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
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors is missing, \d+ were written"):
        Checkpoint.open(step)


def test_a_rank_file_cut_short_is_refused(step):
    path = step / "rank-00000.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=f"has {len(content) - 10} bytes, {len(content)} were written"):
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
