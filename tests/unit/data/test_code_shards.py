"""The contract on disk: what the shards hold, and every way in which a folder can be wrong."""

import hashlib
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from megarq.data.code_shards import CodeShards, ShardError
from megarq.data.manifest import SECTIONS, checksummed
from megarq.errors import DataError

MakeCodes = Callable[..., CodeShards]


def every_place(codes: CodeShards) -> tuple[np.ndarray, np.ndarray]:
    sizes = codes.block_sizes
    return np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(size) for size in sizes])


def test_rows_come_back_from_any_block(make_codes: MakeCodes) -> None:
    codes = make_codes([[30, 7], [12]])
    block, row = every_place(codes)
    shuffle = np.random.default_rng(0).permutation(49)
    for draw in (0, 1, 2):
        stacks = codes.read_codes(block[shuffle], row[shuffle], draw)
        assert stacks.shape == (49, 2, 2, 3) and stacks.dtype == np.uint16
        assert (stacks == ((shuffle + 10 * draw) % 50)[:, None, None, None]).all()


def test_each_row_may_have_its_own_draw(make_codes: MakeCodes) -> None:
    stacks = make_codes([[30]]).read_codes(np.array([0, 0, 0]), np.array([4, 4, 5]), [2, 0, 1])
    assert stacks[:, 0, 0, 0].tolist() == [24, 4, 15]


def test_latents_come_back(make_codes: MakeCodes) -> None:
    latents = make_codes([[30, 7]]).read_latents(np.array([1, 0]), np.array([2, 3]))
    assert latents.dtype == np.float16 and latents.shape == (2, 2, 2, 4)
    assert latents[:, 0, 0, 0].tolist() == [32, 3]


def test_texts_come_back(make_codes: MakeCodes) -> None:
    codes = make_codes([[30, 7], [12]])
    assert codes.key(1, 2) == "key32" and codes.label(1, 2) == 32 % 7
    assert codes.captions(2, 11) == ["first of 48", '"zweite" für\n48']
    assert codes.captions(0, 0)[0] == "first of 0"


def test_missing_captions_and_classes_come_back_empty(make_codes: MakeCodes) -> None:
    codes = make_codes([[3]], captioned=False, labelled=False)
    assert codes.captions(0, 2) == [] and codes.label(0, 2) is None
    assert (codes.captioned, codes.labelled, codes.classes) == (0, 0, 0)


def test_counts_are_in_the_manifest(make_codes: MakeCodes) -> None:
    codes = make_codes([[30, 7], [12]])
    content = json.loads((codes.folder / "manifest.json").read_text())
    assert [content[name] for name in ("samples", "captioned", "labelled", "classes")] == [49, 49, 49, 7]
    assert [shard["samples"] for shard in content["shards"]] == [37, 12]


def test_checksums_are_those_of_the_files(make_codes: MakeCodes) -> None:
    codes = make_codes([[30, 7], [12]])
    for shard in codes.manifest.shards:
        assert hashlib.sha256((codes.folder / shard.file).read_bytes()).hexdigest() == shard.sha256


def test_offsets_in_the_manifest_lead_to_npy_files(make_codes: MakeCodes) -> None:
    codes = make_codes([[30, 7]])
    block = codes.manifest.shards[0].blocks[1]
    offset, size = block.members["draw2.npy"]
    with (codes.folder / "000000.tar").open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    assert data[:6] == b"\x93NUMPY"
    rows = np.frombuffer(data[-7 * 24 :], "<u2").reshape(7, 2, 2, 3)
    assert (rows[:, 0, 0, 0] == (np.arange(30, 37) + 20) % 50).all()


def test_plain_webdataset_reads_the_shards(make_codes: MakeCodes) -> None:
    codes = make_codes([[30, 7], [12]])
    urls = [str(codes.folder / shard.file) for shard in codes.manifest.shards]
    blocks = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [block["__key__"] for block in blocks] == ["000000", "000001", "000000"]
    assert [len(block["codes.npy"]) for block in blocks] == [30, 7, 12]
    assert blocks[1]["draw1.npy"][0, 0, 0, 0] == 40 and blocks[1]["latents.npy"].dtype == np.float16
    assert blocks[2]["samples.json"]["keys"][0] == "key37"
    assert blocks[2]["samples.json"]["captions"][0] == ["first of 37", '"zweite" für\n37']
    assert blocks[2]["samples.json"]["labels"][0] == 2


def test_equal_content_has_equal_bytes(make_codes: MakeCodes) -> None:
    first, second = (make_codes([[30, 7]], name=name).folder for name in ("a", "b"))
    for file in ("000000.tar", "manifest.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_a_split_holds_out_the_last_shards(make_codes: MakeCodes) -> None:
    train, validation = make_codes([[30, 7], [12], [5]]).split(2)
    assert validation is not None and (train.samples, validation.samples) == (37, 17)
    assert validation.key(1, 0) == "key49" and train.key(1, 0) == "key30"


def test_samples_keep_their_ids_in_a_view(make_codes: MakeCodes) -> None:
    view = make_codes([[30, 7], [12], [5]]).subset([2, 0])
    assert view.sample_ids(*every_place(view)).tolist() == [*range(49, 54), *range(37)]


def test_samples_left_out_close_ranks_and_keep_the_numbers_of_the_others(make_codes: MakeCodes) -> None:
    codes = make_codes([[30, 7], [12], [5]]).without([0, 3, 4, *range(30, 37), 48]).without([40, 53])
    kept = [id for id in range(54) if id not in {0, 3, 4, *range(30, 37), 40, 48, 53}]
    for view, ids in ((codes, kept), (codes.subset([1, 2]), [id for id in kept if id >= 37])):
        block, row = every_place(view)
        assert view.samples == len(ids) and view.sample_ids(block, row).tolist() == ids
        assert (view.read_codes(block, row, 1)[:, 0, 0, 0] == (np.array(ids) + 10) % 50).all()
        assert [view.key(*place) for place in zip(block.tolist(), row.tolist(), strict=True)] == [
            f"key{id}" for id in ids
        ]


def test_a_run_is_the_rows_with_those_left_out_between(make_codes: MakeCodes) -> None:
    codes = make_codes([[30, 7]]).without([4, 6])
    out = np.empty((4, 2, 2, 3), np.uint16)
    codes.read_run(0, 2, 2, out)
    assert out[:, 0, 0, 0].tolist() == [(id + 20) % 50 for id in (2, 3, 5, 7)]
    assert codes.text_run("keys", 0, 2, 4) == ["key2", "key3", "key5", "key7"]


def test_no_validation_shards_leave_everything_for_training(make_codes: MakeCodes) -> None:
    codes = make_codes([[3], [2]])
    assert codes.split(0) == (codes, None)


@pytest.mark.parametrize("count", [2, 3, -1])
def test_a_split_with_an_empty_part_is_refused(make_codes: MakeCodes, count: int) -> None:
    with pytest.raises(DataError, match=f"data.validation_shards={count}: .* has 2 shards"):
        make_codes([[3], [2]]).split(count)


def test_few_files_are_open_at_a_time(make_codes: MakeCodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megarq.data.code_shards.MAX_OPEN_FILES", 2)
    codes = make_codes([[2]] * 6)
    block, row = every_place(codes)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert (codes.read_codes(block, row)[:, 0, 0, 0] == np.arange(12)).all()
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 2


def test_few_line_tables_are_kept(make_codes: MakeCodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megarq.data.code_shards.MAX_LINE_TABLES", 1)
    codes = make_codes([[2, 2, 2]])
    assert [codes.key(block, 0) for block in (0, 1, 2, 0)] == ["key0", "key2", "key4", "key0"]


def edit(codes: CodeShards, **changes: object) -> None:
    path = codes.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_shard(codes: CodeShards, **changes: object) -> None:
    shards = json.loads((codes.folder / "manifest.json").read_text())["shards"]
    edit(codes, shards=[shards[0] | changes, *shards[1:]])


def test_a_missing_shard_is_named(make_codes: MakeCodes) -> None:
    codes = make_codes([[3], [2]])
    (codes.folder / "000001.tar").unlink()
    ((path, error),) = CodeShards.open(codes.folder).faulty_files().items()
    assert path == codes.folder / "000001.tar" and str(error).startswith(f"missing code shard {path}")


def test_a_truncated_shard_is_named(make_codes: MakeCodes) -> None:
    codes = make_codes([[3], [2]])
    with (codes.folder / "000001.tar").open("r+b") as file:
        file.truncate(1000)
    codes = CodeShards.open(codes.folder)
    (error,) = codes.faulty_files().values()
    assert re.search(r"000001\.tar has 1000 bytes, the manifest says \d+: it is truncated", str(error))
    with pytest.raises(DataError, match=re.escape(str(error))):
        codes.key(1, 0)


@pytest.mark.parametrize(
    ("part", "read"),
    [
        ("codes.npy", lambda codes, row: codes.read_codes(np.array([1]), np.array([row]))),
        ("codes.npy", lambda codes, row: codes.read_run(1, row, 0, np.empty((1, 2, 2, 3), "<u2"))),
        ("draw2.npy", lambda codes, row: codes.read_run(1, row, 2, np.empty((1, 2, 2, 3), "<u2"))),
        ("latents.npy", lambda codes, row: codes.read_latents(np.array([1]), np.array([row]))),
        ("keys", lambda codes, row: codes.key(1, row)),
        ("captions", lambda codes, row: codes.captions(1, row)),
        ("labels", lambda codes, row: codes.label(1, row)),
    ],
)
@pytest.mark.parametrize("where", ["data", "checksum"])
def test_a_flipped_bit_is_noticed_by_whoever_reads_the_row_and_by_nobody_else(
    make_codes: MakeCodes, part: str, read: Callable[[CodeShards, int], object], where: str
) -> None:
    codes, row, rows = make_codes([[3, 9], [2]]), 5, 9
    members = codes.manifest.shards[0].blocks[1].members
    if where == "checksum":
        offset, size = members["crc32.npy"]
        columns = checksummed(codes.settings)
        place = offset + size - (rows - row) * 4 * len(columns) + 4 * columns.index(part)
    elif part in SECTIONS:
        offset, size = members["samples.json"]
        lines = (codes.folder / "000000.tar").read_bytes()[offset : offset + size].splitlines(keepends=True)
        place = offset + sum(map(len, lines[: SECTIONS.index(part) * (rows + 1) + 1 + row])) + 1
    else:
        offset, size = members[part]
        place = offset + size - (rows - row) * codes._row_bytes[part]
    flip_bit(codes.folder / "000000.tar", place)
    read(codes, row - 1)
    read(codes, row + 1)
    for _ in range(2):
        with pytest.raises(
            ShardError, match=rf"000000\.tar: a block is damaged \({part} and its checksum differ"
        ) as raised:
            read(codes, row)
        assert raised.value.blocks.tolist() == [1] and not raised.value.passing
    flip_bit(codes.folder / "000000.tar", place)
    read(codes, row)


def flip_bit(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    with file.open("r+b") as opened:  # the same file, for those who have it open
        opened.write(data)


def test_a_shard_that_is_cut_and_made_whole_again_is_read_again(make_codes: MakeCodes) -> None:
    codes = make_codes([[3], [2, 4]])
    assert codes.key(2, 1) == "key6"
    path = codes.folder / "000001.tar"
    data = path.read_bytes()
    for damage in (path.unlink, lambda: path.write_bytes(data[:600])):
        damage()
        codes = pickle.loads(pickle.dumps(codes))  # as in another process: no file is open
        with pytest.raises(ShardError) as raised:
            codes.key(2, 1)
        assert raised.value.blocks.tolist() == [1, 2] and raised.value.passing
        path.write_bytes(data)
        assert codes.key(2, 1) == "key6"


def test_shard_errors_travel_between_processes(make_codes: MakeCodes) -> None:
    error = pickle.loads(pickle.dumps(ShardError("gone", [3, 4], passing=True)))
    assert (str(error), error.blocks.tolist(), error.passing) == ("gone", [3, 4], True)


def test_a_shard_cut_while_open_is_an_error(make_codes: MakeCodes) -> None:
    codes = make_codes([[3]])
    codes.key(0, 0)
    with (codes.folder / "000000.tar").open("r+b") as file:
        file.truncate(600)
    with pytest.raises(DataError, match="truncated"):
        codes.read_codes(np.array([0]), np.array([0]))


def test_damaged_captions_are_an_error(make_codes: MakeCodes) -> None:
    codes = make_codes([[3]])
    offset, _ = codes.manifest.shards[0].blocks[0].members["samples.json"]
    path = codes.folder / "000000.tar"
    data = bytearray(path.read_bytes())
    data[offset : offset + 20] = b"\n" * 20
    path.write_bytes(data)
    with pytest.raises(DataError, match="a block is damaged"):
        codes.captions(0, 0)


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        CodeShards.open(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_manifest_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        CodeShards.open(tmp_path)


def test_another_format_version_is_refused(make_codes: MakeCodes) -> None:
    codes = make_codes([[3]])
    edit(codes, version=1)
    with pytest.raises(DataError, match="version 1, but this version of MegaRQ reads 'megarq-codes' version 3"):
        CodeShards.open(codes.folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draws": 3}, "no field 'draw3.npy'"),
        ({"samples": 4}, "the total says 4"),
        ({"code_shape": [2, 2]}, "code_shape"),
        ({"codebook_sizes": [50]}, "codebook_sizes"),
        ({"code_shape": [200, 200, 3]}, "does not fit"),
        ({"shards": None}, "damaged"),
    ],
)
def test_an_inconsistent_manifest_is_refused(make_codes: MakeCodes, changes: dict[str, object], message: str) -> None:
    codes = make_codes([[3]])
    edit(codes, **changes)
    with pytest.raises(DataError, match=message):
        CodeShards.open(codes.folder)


@pytest.mark.parametrize("name", ["../000000.tar", "/etc/passwd", "..", "a/b.tar"])
def test_shard_names_cannot_leave_the_folder(make_codes: MakeCodes, name: str) -> None:
    codes = make_codes([[3]])
    edit_shard(codes, file=name)
    with pytest.raises(DataError, match="no plain name"):
        CodeShards.open(codes.folder)


def test_shard_counts_must_add_up(make_codes: MakeCodes) -> None:
    codes = make_codes([[3]])
    edit_shard(codes, samples=4)
    with pytest.raises(DataError, match="claims 4 samples"):
        CodeShards.open(codes.folder)


def test_codes_of_another_rqvae_are_refused(make_codes: MakeCodes) -> None:
    codes = make_codes([[3]])
    codes.check_fingerprint("f" * 64)
    with pytest.raises(DataError, match="codes of the RQ-VAE ffffffffffff, but this model has the RQ-VAE eeeeeeeeeeee"):
        codes.check_fingerprint("e" * 64)


@pytest.mark.parametrize(("shape", "sizes"), [((2, 2, 4), (50, 50, 50)), ((2, 2, 3), (50, 50, 60))])
def test_codes_that_do_not_fit_the_model_are_refused(
    make_codes: MakeCodes, shape: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    codes = make_codes([[3]])
    codes.check_model((2, 2, 3), (50, 50, 50), "f" * 64)
    with pytest.raises(DataError, match="the model expects"):
        codes.check_model(shape, sizes)


def test_reading_latents_that_are_not_stored_is_an_error(make_codes: MakeCodes) -> None:
    with pytest.raises(DataError, match="--latents"):
        make_codes([[3]], latent_shape=None).read_latents(np.array([0]), np.array([0]))
