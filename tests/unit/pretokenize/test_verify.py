"""Every check of verify_codes meets the damage it is for, on folders that pre-tokenization made."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from captioned_tars import picture, small_rqvae, write_tar
from PIL import Image
from scripts import load_script
from tiny_codes import image_tar, tiny_codes

from megarq.data.code_shards import CodeShards
from megarq.errors import ConfigError, DataError
from megarq.inference.pretrained import save_rqvae
from megarq.pretokenize.pictures import names
from megarq.pretokenize.verify import Report, Status, verify
from megarq.text.training import train_tokenizer

COUNTS = (11, 4, 6)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ of three tars, and codes/ of them."""
    root, number, tars = tmp_path_factory.mktemp("made"), 0, []
    (root / "images").mkdir()
    for shard, count in enumerate(COUNTS):
        samples = [(f"k{n}", picture(n), f"picture number {n}") for n in range(number, number + count)]
        tars.append(image_tar(root / "images" / f"{shard:05d}.tar", samples))
        number += count
    tiny_codes(root / "codes", tars, small_rqvae(0))
    return root


@pytest.fixture
def codes(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made / "codes", tmp_path / "codes"))


def failed(report: Report) -> dict[str, str]:
    """Names of the checks that failed, each with all that it says."""
    return {check.name: " ".join([check.result, *check.where]) for check in report.checks if check.status == "FAILED"}


def check(codes: Path, **options: object) -> Report:
    return verify(codes, progress=False, **options)[0]  # type: ignore[arg-type]


def overwrite(file: Path, offset: int, data: bytes) -> None:
    content = bytearray(file.read_bytes())
    content[offset : offset + len(data)] = data
    file.write_bytes(content)


def member(codes: Path, shard: int, name: str) -> tuple[Path, int, int]:
    """(file, offset, size) of the data of a tar's first member that ends in `name`."""
    path = codes / f"{shard:06d}.tar"
    with tarfile.open(path) as tar:
        info = next(info for info in tar if info.name.endswith(name))
        return path, info.offset_data, info.size


def edit_manifest(codes: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = codes / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_undamaged_folder_passes_every_check(codes: Path, workers: int) -> None:
    report, whole = verify(codes, rqvae=small_rqvae(0), workers=workers, progress=False)
    assert report.passed() and whole is not None and whole.samples == sum(COUNTS)
    assert {check.status for check in report.checks if check.name != "codebook"} == {Status.OK}, report.text()


def test_usage_perplexity_and_agreement_are_those_of_the_codes(codes: Path) -> None:
    facts, shards = check(codes).facts, CodeShards.open(codes)
    places = np.concatenate([[(b, row) for row in range(n)] for b, n in enumerate(shards.block_sizes)]).T
    argmin, *draws = (shards.read_codes(*places, draw) for draw in range(3))
    for depth in range(3):
        share = np.bincount(argmin[..., depth].ravel()) / argmin[..., depth].size
        entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
        assert facts["codebook perplexity, argmin, per depth"][depth] == pytest.approx(np.exp(entropy))
        assert facts["codes used, argmin, per depth"][depth] == (share > 0).sum() / 32
        equal = np.mean([(draw == argmin)[..., depth].mean() for draw in draws])
        assert facts["draws equal to argmin, per depth"][depth] == pytest.approx(equal)


def test_one_changed_byte_fails_the_checksum_and_names_the_shard(codes: Path) -> None:
    path, offset, size = member(codes, 1, "latents.npy")
    overwrite(path, offset + size - 2, bytes([path.read_bytes()[offset + size - 2] ^ 1]))
    found = failed(check(codes))
    assert found.keys() == {"checksums"}
    assert (
        "000001.tar: block 000000: latents.npy of 1 samples is not as it was written, key 'k14'" in found["checksums"]
    )


def test_a_removed_shard_fails(codes: Path) -> None:
    (codes / "000001.tar").unlink()
    assert failed(check(codes)) == {"files": "1 found 000001.tar: missing"}


@pytest.mark.parametrize("kept", [0.2, 0.6])
def test_a_cut_shard_fails(codes: Path, kept: float) -> None:
    path = codes / "000000.tar"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    found = failed(check(codes))
    assert {"files", "checksums", "tar members", "counts"} <= found.keys()
    assert f"000000.tar: {int(kept * len(content))} bytes, {len(content)} in the manifest" in found["files"]


def test_a_damaged_tar_header_fails_where_plain_tarfile_stops(codes: Path) -> None:
    path, offset, _ = member(codes, 0, "000001.codes.npy")
    overwrite(path, offset - 512, b"\xff" * 300)
    assert "1 blocks in the tar, 3 in the manifest" in failed(check(codes))["tar members"]


@pytest.mark.parametrize(("name", "depth"), [("codes.npy", 3), ("draw2.npy", 1)])
def test_a_code_beyond_the_codebook_fails_and_names_its_sample(codes: Path, name: str, depth: int) -> None:
    path, offset, size = member(codes, 1, name)
    of_sample_2 = offset + size - 2 * 4 * 4 * 3 * 2 + 2 * (depth - 1)
    overwrite(path, of_sample_2, np.uint16(32).tobytes())
    assert f"{name} has code 32 of 32 at depth {depth}, key 'k13'" in failed(check(codes))["code range"]


def test_a_latent_that_is_not_finite_fails(codes: Path) -> None:
    path, offset, size = member(codes, 1, "latents.npy")
    overwrite(path, offset + size - 2, np.float16("inf").tobytes())
    assert "latents.npy is not finite, key 'k14'" in failed(check(codes))["code range"]


def test_an_array_of_another_type_fails(codes: Path) -> None:
    path, offset, size = member(codes, 0, "draw1.npy")
    header = path.read_bytes()[offset : offset + size].replace(b"'<u2'", b"'<i2'")
    overwrite(path, offset, header)
    assert "draw1.npy is int16" in failed(check(codes))["arrays"]


def test_damaged_text_fails(codes: Path) -> None:
    path, offset, _ = member(codes, 2, "samples.json")
    overwrite(path, offset, b"[")
    assert "samples.json is damaged" in failed(check(codes))["arrays"]


def test_members_at_other_offsets_than_recorded_fail(codes: Path) -> None:
    path = codes / "000001.tar"
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info)) for info in tar]
        assert [info.name for info, _ in members[1:3]] == ["000000.draw1.npy", "000000.draw2.npy"]
        content = [(info, io.BytesIO(file.read())) for info, file in members if file is not None]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in (0, 2, 1, *range(3, len(content))):
            tar.addfile(*content[number])
    found = failed(check(codes))
    assert found.keys() == {"checksums", "tar members"}
    assert "the manifest's offset of draw1.npy leads to other bytes" in found["tar members"]


@pytest.mark.parametrize("name", ["captioned", "labelled", "classes"])
def test_a_count_that_differs_fails(codes: Path, name: str) -> None:
    edit_manifest(codes, lambda document: document["shards"][1].update({name: 3}))  # type: ignore[index]
    found = failed(check(codes))
    assert found.keys() == {"counts"} and f"{name}, 3 in the manifest" in found["counts"]


def test_a_manifest_whose_total_differs_fails(codes: Path) -> None:
    edit_manifest(codes, lambda document: document.update(samples=22))
    assert "the total says 22" in failed(check(codes))["manifest"]


def test_a_folder_without_manifest_fails(codes: Path) -> None:
    (codes / "manifest.json").unlink()
    assert "no manifest.json" in failed(check(codes))["manifest"]


def test_another_model_fails(codes: Path) -> None:
    assert failed(check(codes, rqvae=small_rqvae(1))).keys() == {"given model"}


def test_another_rqvae_in_the_folder_fails(codes: Path) -> None:
    for name in ("config.json", "rqvae.safetensors"):
        (codes / name).unlink()
    assert "no RQ-VAE" in failed(check(codes))["stored RQ-VAE"]
    save_rqvae(small_rqvae(1), codes)
    assert "the codes are of" in failed(check(codes))["stored RQ-VAE"]


def test_a_damaged_shard_leaves_the_others_to_be_looked_at(codes: Path) -> None:
    (codes / "000000.tar").unlink()
    report, whole = verify(codes, progress=False)
    assert whole is not None and whole.samples == 10 and names(whole, [0]) == ["000001.tar/k11"]
    assert report.facts["damaged shards"] == 1


@pytest.fixture
def repeating(tmp_path: Path) -> Path:
    """Two shards: the key `a` in both, `b`'s picture under another key, two samples without caption."""
    first = [("a", picture(1), "one two"), ("b", picture(2), "three"), ("c", picture(3), "")]
    second = [("a", picture(4), "four five six"), ("d", picture(2), "seven"), ("e", picture(5), "")]
    tars = [image_tar(tmp_path / f"{n}.tar", samples) for n, samples in enumerate((first, second))]
    return tiny_codes(tmp_path / "codes", tars, small_rqvae(0))


def warnings(report: Report) -> dict[str, str]:
    return {check.name: " ".join([check.result, *check.where]) for check in report.checks if check.status == "warning"}


def test_keys_and_pictures_that_repeat_across_shards_are_warned_of(repeating: Path) -> None:
    report = check(repeating)
    assert report.passed() and not report.passed(strict=True)
    assert "000000.tar/a and 000001.tar/a" in warnings(report)["repeated keys"]
    assert "1 of 6" in warnings(report)["repeated keys"] and "0 of the first 1" in warnings(report)["repeated keys"]
    assert "000000.tar/b and 000001.tar/d" in warnings(report)["repeated pictures"]


def test_samples_without_caption_are_warned_of_and_named(repeating: Path) -> None:
    found = warnings(check(repeating))["captions"]
    assert "2 of 6 samples have none" in found and "000000.tar/c" in found and "000001.tar/e" in found


def test_truncation_is_the_share_of_captions_longer_than_the_length(repeating: Path, tmp_path: Path) -> None:
    tokenizer, _ = train_tokenizer(["one two three four five six seven"] * 4, 64, tmp_path / "tokenizer.json")
    tokens = [tokenizer.count(text) for text in ("one two", "three", "four five six", "seven")]
    report = check(repeating, tokenizer=tokenizer, length=sorted(tokens)[2])
    assert report.facts["captions cut"] == 0.25 and "truncation" in warnings(report)


def test_a_stray_tar_is_warned_of(codes: Path) -> None:
    shutil.copy(codes / "000000.tar", codes / "000007.tar")
    assert "other files" in warnings(check(codes))


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_script("tools/verify_codes.py")


def test_the_command_reconstructs_and_draws_a_grid(tool: ModuleType, made: Path, tmp_path: Path) -> None:
    images = str(made / "images" / "*.tar")
    tool.main([str(made / "codes"), "--images", images, "--output", str(tmp_path / "out"), "--device", "cpu"])
    facts = json.loads((tmp_path / "out" / "report.json").read_text())["facts"]
    assert facts["reconstructed"] == sum(COUNTS) and facts["same codes when encoded again, per depth"] == [1.0] * 3
    assert facts["psnr"] == pytest.approx(10 * np.log10(4 / facts["mse"]), abs=1)
    with Image.open(tmp_path / "out" / "grid.png") as sheet:
        assert np.asarray(sheet).min() < 50 and sheet.width > 1000


def test_originals_are_read_with_the_caption_field_of_the_codes(tool: ModuleType, tmp_path: Path) -> None:
    said = {"png": picture(0), "txt": b"\xff", "json": b'{"text": "a picture"}'}
    write_tar(tmp_path / "0.tar", {f"k.{extension}": data for extension, data in said.items()})
    images = str(tmp_path / "0.tar")
    codes = tiny_codes(tmp_path / "codes", [images], small_rqvae(0), caption_field="text")
    tool.main([str(codes), "--images", images, "--device", "cpu"])


def test_the_command_refuses_image_shards_of_one_name(tool: ModuleType, made: Path, tmp_path: Path) -> None:
    shards = [tmp_path / folder / "images" / "00000.tar" for folder in "ab"]
    for shard in shards:
        shard.parent.mkdir(parents=True)
        image_tar(shard, [])
    with pytest.raises(DataError, match="have the same name in manifests"):
        tool.main([str(made / "codes"), "--images", *map(str, shards)])


def test_the_command_fails_with_other_pictures_under_the_same_keys(
    tool: ModuleType, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    other = image_tar(tmp_path / "images" / "00000.tar", [(f"k{n}", picture(n + 100), "x") for n in range(1, 11)])
    with pytest.raises(SystemExit, match="1"):
        tool.main([str(made / "codes"), "--images", other, "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "other pictures or transform" in printed and "000000.tar/k0" in printed


def test_the_command_refuses_image_shards_of_other_codes(tool: ModuleType, made: Path, tmp_path: Path) -> None:
    other = image_tar(tmp_path / "other.tar", [("x", picture(1), "x")])
    with pytest.raises(DataError, match="none of the 1 image shards given is a source of these codes"):
        tool.main([str(made / "codes"), "--images", other, "--device", "cpu"])


def test_the_commands_exit_status_follows_the_report(tool: ModuleType, repeating: Path) -> None:
    options = [str(repeating), "--model", str(repeating), "--device", "cpu"]
    tool.main(options)
    with pytest.raises(SystemExit, match="1"):
        tool.main([*options, "--strict"])
    (repeating / "000001.tar").unlink()
    with pytest.raises(SystemExit, match="1"):
        tool.main([*options, "--json"])


def test_the_command_names_a_missing_folder(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        tool.main([str(tmp_path / "none")])


def test_the_command_wants_tokenizer_and_length_together(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give both or neither"):
        tool.main([str(tmp_path), "--length", "32"])
