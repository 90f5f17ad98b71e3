"""What may be wrong with image shards or befall a run, provoked for real: counted, named, nothing lost or doubled."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from captioned_tars import contents, picture, write_tar
from little_space import little_space

from megarq.data.code_shards import CodeShards
from megarq.data.faults import Faults
from megarq.data.files import expand_shards
from megarq.data.manifest import CodeSettings, Manifest
from megarq.errors import CheckpointError, DataError
from megarq.pretokenize.decoder import Decoder
from megarq.rqvae.model import RQVAE

Run = Callable[..., Manifest]


def keys(folder: Path) -> list[str]:
    codes = CodeShards.open(folder)
    return [codes.key(block, row) for block, size in enumerate(codes.block_sizes) for row in range(size)]


def numbered(*numbers: int) -> list[str]:
    return [f"k{number}" for number in numbers]


def test_an_unreadable_picture_is_skipped_counted_and_named(
    run: Run, sources: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(Path(sources[1]), {"broken.jpg": b"no picture", "broken.txt": b"a picture"}, mode="a")
    with pytest.raises(DataError, match="1 bad samples of 22 seen"):
        run()
    manifest = run(max_bad_rate=0.1)
    assert [shard.skipped for shard in manifest.shards] == [0, 1, 0]
    assert [shard.faults for shard in manifest.shards] == [{}, {"unreadable image": 1}, {}]
    assert keys(tmp_path / "codes") == numbered(*range(21))
    assert f"skipped broken in {sources[1]}: unreadable image" in caplog.text


def test_a_picture_of_another_size_is_said_to_be_one(
    run: Run, sources: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    fitting = {f"fits{number}.png": picture(number, 8, 8) for number in range(2)}
    write_tar(Path(sources[1]), fitting, mode="a")  # all others are 10x8
    assert run(max_bad_rate=0.95, transform="none").faults["wrong size"] == 21
    assert f"in {sources[0]}: wrong size: a picture of 10x8 with transform none at resolution 8" in caplog.text


def test_a_truncated_shard_keeps_its_whole_samples(run: Run, sources: list[str], tmp_path: Path) -> None:
    data = Path(sources[0]).read_bytes()
    Path(sources[0]).write_bytes(data[: len(data) // 2])
    manifest = run(max_bad_rate=0.2)
    kept = manifest.shards[0].samples
    assert manifest.faults == {"truncated shard": 1} and 0 < kept < 11
    assert keys(tmp_path / "codes") == numbered(*range(kept), *range(11, 21))


def test_a_mended_image_shard_alone_is_read_again(
    run: Run, sources: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("whole")
    data = Path(sources[0]).read_bytes()
    Path(sources[0]).write_bytes(data[: len(data) // 2])
    run(max_bad_rate=0.2)
    made = (tmp_path / "codes" / "000001.tar").stat().st_mtime_ns
    Path(sources[0]).write_bytes(data)
    run()
    assert contents(tmp_path / "codes") == contents(tmp_path / "whole")
    assert (tmp_path / "codes" / "000001.tar").stat().st_mtime_ns == made
    assert f"making 000000.tar again: images/00000.tar had {len(data) // 2} bytes, now {len(data)}" in caplog.text


def test_one_bad_shard_does_not_end_a_run_whose_whole_is_good(
    run: Run, sources: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(Path(sources[0]), [(f"bad{number}.txt", b"no picture") for number in range(1100)])
    with pytest.raises(DataError, match="1100 bad samples of 1110 seen"):
        run(max_bad_rate=0.5)
    assert "bad1099" in caplog.text  # 550 of the first shard's would end it


def test_pictures_without_finite_latents_are_left_out(
    run: Run, rqvae: RQVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("whole")
    encode, passes = rqvae.encode, iter(range(100))

    def overflowing(images: torch.Tensor) -> torch.Tensor:
        """Batches of 4, 1, 4, 1, 1: the second block's all, and a row of the first's."""
        latents, number = encode(images), next(passes)
        if number in (2, 3):
            latents[:] = torch.nan
        if number == 0:
            latents[1] = torch.inf
        return latents

    monkeypatch.setattr(rqvae, "encode", overflowing)
    manifest = run(max_bad_rate=0.5)
    assert keys(tmp_path / "codes") == numbered(0, 2, 3, 4, *range(10, 21))
    assert manifest.shards[0].faults == {"not finite": 6} and manifest.shards[0].skipped == 6
    ours, whole = (CodeShards.open(tmp_path / name) for name in ("codes", "whole"))
    zeros, rows = np.zeros(4, int), np.array([0, 2, 3, 4])
    assert np.array_equal(ours.read_codes(zeros, np.arange(4)), whole.read_codes(zeros, rows))
    assert all(np.isfinite(manifest.perplexity))


def test_a_sample_without_caption_is_used_and_counted(run: Run, sources: list[str], tmp_path: Path) -> None:
    write_tar(Path(sources[1]), {"bare.png": picture(99)}, mode="a")
    manifest = run()
    assert (manifest.shards[1].samples, manifest.shards[1].captioned) == (5, 4)
    assert manifest.faults == {"no caption": 1} and manifest.shards[1].skipped == 0


def test_the_second_sample_of_a_key_is_skipped(run: Run, sources: list[str], tmp_path: Path) -> None:
    write_tar(Path(sources[1]), {"k11.png": picture(99), "k11.txt": b"another"}, mode="a")
    assert run(max_bad_rate=0.1).faults == {"duplicate key": 1}
    assert keys(tmp_path / "codes") == numbered(*range(21))


def test_a_shard_listed_twice_is_read_once(run: Run, sources: list[str], tmp_path: Path) -> None:
    run(given=expand_shards([*sources, sources[1]]))
    assert keys(tmp_path / "codes") == numbered(*range(21))


def test_an_image_shard_without_samples_becomes_an_empty_shard(run: Run, sources: list[str], tmp_path: Path) -> None:
    write_tar(Path(sources[1]), {})
    manifest = run()
    assert [shard.samples for shard in manifest.shards] == [11, 0, 6] and manifest.faults == {"empty shard": 1}
    assert CodeShards.open(tmp_path / "codes").key(3, 0) == "k15"


def test_sources_without_any_sample_are_refused(run: Run, tmp_path: Path) -> None:
    write_tar(tmp_path / "empty.tar", {})
    with pytest.raises(DataError, match="no usable picture in 1 image shards"):
        run(given=[str(tmp_path / "empty.tar")])


def test_a_shard_that_cannot_be_read_stops_no_other(run: Run, sources: list[str], tmp_path: Path) -> None:
    run("whole")
    away = Path(sources[0]).rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"1 of 3 image shards could not be read:\n    .*00000\.tar: missing shard"):
        run()
    assert {"000001.tar", "000002.tar"} < set(contents(tmp_path / "codes"))
    made = (tmp_path / "codes" / "000001.tar").stat().st_mtime_ns
    away.rename(sources[0])
    run()
    assert contents(tmp_path / "codes") == contents(tmp_path / "whole")
    assert (tmp_path / "codes" / "000001.tar").stat().st_mtime_ns == made


def test_a_full_disk_stops_the_run_and_a_rerun_finishes_it(
    run: Run, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run("whole")
    whole, codes = contents(tmp_path / "whole"), tmp_path / "codes"
    request.addfinalizer(lambda: subprocess.run(["umount", str(codes)], capture_output=True))
    with little_space(codes, size=32 * 1024):
        with pytest.raises(DataError, match=r"cannot be written \(.*\)\. Free space or choose another output folder"):
            run()
        tars = {name: data for name, data in contents(codes).items() if not name.startswith(".") and ".tar" in name}
        assert tars.items() < whole.items()
    run()
    assert contents(codes) == whole


def test_a_dead_worker_process_is_reported(settings: CodeSettings, sources: list[str]) -> None:
    with Decoder(settings, workers=1) as decoder:
        batches = decoder.batches(sources[0], Faults())
        next(batches)
        assert decoder._pool is not None
        for pid in decoder._pool._processes:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(DataError, match="a decoding process was killed or crashed"):
            for source in sources * 2:
                list(decoder.batches(source, Faults()))


def test_bytes_and_faults_do_not_depend_on_worker_processes(run: Run, sources: list[str], tmp_path: Path) -> None:
    write_tar(Path(sources[0]), {"broken.jpg": b"no picture", "bare.png": picture(98)}, mode="a")
    assert run("0", max_bad_rate=0.1).faults == run("2", max_bad_rate=0.1, workers=2).faults
    assert contents(tmp_path / "0") == contents(tmp_path / "2")


def test_pictures_without_the_caption_field_are_used_and_counted(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = {f"a{number}.{kind}": data for number in range(3) for kind, data in captioned(number).items()}
    write_tar(tmp_path / "0.tar", there)
    write_tar(tmp_path / "1.tar", {"b0.png": picture(7), "b1.png": picture(8)})
    given = [str(tmp_path / "0.tar"), str(tmp_path / "1.tar")]
    manifest = run(given=given, caption_field="description")
    assert [shard.captioned for shard in manifest.shards] == [3, 0]
    assert manifest.faults == {"no caption": 2}
    assert f"{given[1]}: no picture has the caption field 'description'" in caplog.text and given[0] not in caplog.text


def captioned(number: int) -> dict[str, bytes]:
    return {"png": picture(number), "json": b'{"description": "a picture"}'}


def test_a_caption_field_that_no_picture_has_is_one_error(run: Run, sources: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no picture has a caption in the field 'descriptoin' of its \.json"):
        run(caption_field="descriptoin")
    assert not (tmp_path / "codes" / "manifest.json").exists()


def test_a_disk_that_is_full_at_the_end_leaves_the_shards_to_a_rerun(
    run: Run, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run("whole")
    codes = tmp_path / "codes"
    request.addfinalizer(lambda: subprocess.run(["umount", str(codes)], capture_output=True))
    shards = sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.tar"))
    with little_space(codes, size=shards + 200_000):
        with pytest.raises(CheckpointError, match=r"rqvae.safetensors cannot be written \(.*\)\. Free space"):
            run()
        assert len(list(codes.glob("0*.tar"))) == 3 and not (codes / "manifest.json").exists()
    made = {path.name: path.stat().st_mtime_ns for path in codes.glob("0*.tar")}
    run()
    assert contents(codes) == contents(tmp_path / "whole")
    assert {path.name: path.stat().st_mtime_ns for path in codes.glob("0*.tar")} == made
