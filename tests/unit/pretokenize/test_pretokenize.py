"""Image shards to code shards with a small RQ-VAE: content, repetition, interruption, and wrong folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from captioned_tars import contents, small_rqvae, write_tars
from scripts import load_script

from megarq.data.code_shards import CodeShards
from megarq.data.faults import Faults
from megarq.data.image_shards import read_samples
from megarq.data.manifest import Manifest
from megarq.data.transforms import transform_image
from megarq.errors import DataError
from megarq.inference.pretrained import load_rqvae, save_rqvae
from megarq.pretokenize.run import code_settings
from megarq.rqvae.model import RQVAE, fingerprint


def every_place(codes: CodeShards) -> tuple[np.ndarray, np.ndarray]:
    sizes = codes.block_sizes
    return np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(size) for size in sizes])


def test_each_image_shard_becomes_one_code_shard_of_small_blocks(run: Callable[..., Manifest]) -> None:
    manifest = run()
    assert [shard.file for shard in manifest.shards] == ["000000.tar", "000001.tar", "000002.tar"]
    assert [[block.samples for block in shard.blocks] for shard in manifest.shards] == [[5, 5, 1], [4], [5, 1]]
    assert [shard.source for shard in manifest.shards] == [f"images/0000{n}.tar" for n in range(3)]


def test_codes_are_the_rqvaes(run: Callable[..., Manifest], rqvae: RQVAE, sources: list[str], tmp_path: Path) -> None:
    run()
    codes = CodeShards.open(tmp_path / "codes")
    samples = [sample for source in sources for sample in read_samples(source, Faults())]
    pictures = torch.stack([transform_image(sample.image, "center", 8) for sample in samples])
    with torch.no_grad():
        latents = rqvae.encode(pictures)
    places = every_place(codes)
    assert np.allclose(codes.read_latents(*places), latents.numpy(), atol=2e-3)
    agreement = (codes.read_codes(*places) == rqvae.quantize(latents).numpy()).mean()
    assert agreement > 0.99  # another batch size may turn a near tie


def test_keys_captions_and_classes_stay_with_their_pictures(run: Callable[..., Manifest], tmp_path: Path) -> None:
    run()
    codes = CodeShards.open(tmp_path / "codes")
    assert (codes.key(3, 2), codes.captions(3, 2), codes.label(3, 2)) == ("k13", ["picture 13"], 1)


def test_draws_differ_from_each_other_but_are_drawn_from_q(run: Callable[..., Manifest], tmp_path: Path) -> None:
    run(temperature=100.0)
    codes = CodeShards.open(tmp_path / "codes")
    places = every_place(codes)
    argmin, first, second = (codes.read_codes(*places, draw) for draw in range(3))
    assert (first != second).mean() > 0.5 and (first != argmin).mean() > 0.5 and first.max() < 32


def test_draws_at_a_low_temperature_are_the_argmin(run: Callable[..., Manifest], tmp_path: Path) -> None:
    run(temperature=1e-6)
    codes = CodeShards.open(tmp_path / "codes")
    places = every_place(codes)
    assert (codes.read_codes(*places, 1) == codes.read_codes(*places)).mean() > 0.99


def test_perplexity_follows_the_temperature(run: Callable[..., Manifest]) -> None:
    hot, cold = run("hot", temperature=1e4).perplexity, run("cold", temperature=1e-6).perplexity
    assert hot == pytest.approx([32.0] * 3, rel=0.01) and cold == pytest.approx([1.0] * 3, abs=0.05)


def test_two_runs_write_the_same_bytes(run: Callable[..., Manifest], tmp_path: Path) -> None:
    run("a")
    run("b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_halved_precision_gives_nearly_the_same_codes(
    run: Callable[..., Manifest], tmp_path: Path, precision: str
) -> None:
    run("fp32")
    run(precision, precision=precision)
    exact, halved = (CodeShards.open(tmp_path / name) for name in ("fp32", precision))
    agreement = exact.read_codes(*every_place(exact)) == halved.read_codes(*every_place(halved))
    assert halved.settings.precision == precision and 0.8 < agreement[..., 0].mean() <= 1.0


def test_latents_that_all_overflow_are_refused(run: Callable[..., Manifest], caplog: pytest.LogCaptureFixture) -> None:
    large = small_rqvae(0)
    with torch.no_grad():
        large.quant_conv.bias.fill_(1e5)
    with pytest.raises(DataError, match=r"21 bad samples of 21 seen.*\(21 not finite"):
        run(model=large, precision="fp16", latent_shape=None)
    assert "00002.tar: not finite: its latents in fp16; try --precision bf16" in caplog.text
    run("bf16", model=large, precision="bf16", latent_shape=None)


def test_a_shards_bytes_do_not_depend_on_the_other_shards(
    run: Callable[..., Manifest], sources: list[str], tmp_path: Path
) -> None:
    run("all")
    run("one", given=sources[:1])
    assert (tmp_path / "all" / "000000.tar").read_bytes() == (tmp_path / "one" / "000000.tar").read_bytes()


def test_a_drawn_stack_does_not_depend_on_block_or_batch(run: Callable[..., Manifest], tmp_path: Path) -> None:
    run("a")
    run("b", batch_size=3, block_size=7)
    a, b = (CodeShards.open(tmp_path / name) for name in "ab")
    assert (a.read_codes(*every_place(a), 1) == b.read_codes(*every_place(b), 1)).mean() > 0.99


class KilledError(BaseException):
    """Stands for a signal: nothing may catch it."""


def killed_after(passes: int, rqvae: RQVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the encoder run a number of passes, then die."""
    encode, left = rqvae.encode, iter(range(passes))

    def dying(images: torch.Tensor) -> torch.Tensor:
        if next(left, None) is None:
            raise KilledError
        return encode(images)

    monkeypatch.setattr(rqvae, "encode", dying)


@pytest.mark.parametrize("passes", [0, 3, 5, 6, 8])
def test_an_interrupted_run_continues_to_the_same_bytes(
    run: Callable[..., Manifest], rqvae: RQVAE, tmp_path: Path, passes: int
) -> None:
    run("whole")
    with pytest.MonkeyPatch.context() as patch:
        killed_after(passes, rqvae, patch)
        with pytest.raises(KilledError):
            run("codes")
    assert not (tmp_path / "codes" / "manifest.json").exists()
    run("codes")
    assert contents(tmp_path / "codes") == contents(tmp_path / "whole")


def test_the_half_file_of_a_killed_run_is_overwritten(run: Callable[..., Manifest], tmp_path: Path) -> None:
    run("whole")
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / ".000001.tar.tmp").write_bytes(b"half")
    run("codes")
    assert contents(tmp_path / "codes") == contents(tmp_path / "whole")


def test_finished_shards_are_not_encoded_again(run: Callable[..., Manifest], rqvae: RQVAE) -> None:
    with pytest.MonkeyPatch.context() as patch:
        killed_after(6, rqvae, patch)
        with pytest.raises(KilledError):
            run()
    with pytest.MonkeyPatch.context() as patch:
        killed_after(3, rqvae, patch)
        run()


def test_a_rerun_of_a_finished_folder_encodes_nothing(run: Callable[..., Manifest], rqvae: RQVAE) -> None:
    first = run()
    with pytest.MonkeyPatch.context() as patch:
        killed_after(0, rqvae, patch)
        assert run() == first


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_output_shard_alone_is_made_again(
    run: Callable[..., Manifest], rqvae: RQVAE, tmp_path: Path, damage: str
) -> None:
    run()
    before, shard = contents(tmp_path / "codes"), tmp_path / "codes" / "000001.tar"
    if damage == "remove":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.MonkeyPatch.context() as patch:
        killed_after(1, rqvae, patch)
        run()
    assert contents(tmp_path / "codes") == before


def test_more_image_shards_may_be_appended(run: Callable[..., Manifest], sources: list[str], tmp_path: Path) -> None:
    run("whole")
    run("codes", given=sources[:2])
    run("codes")
    assert contents(tmp_path / "codes") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 1.0}, "begun with temperature=0.5, this command has temperature=1.0"),
        ({"threads": 2}, "begun with threads=0, this command has threads=2"),
        ({"draws": 3}, "begun with draws=2, this command has draws=3"),
        ({"model": small_rqvae(1)}, "begun with fingerprint="),
    ],
    ids=["temperature", "threads", "draws", "rqvae"],
)
def test_a_folder_of_other_settings_is_refused(
    run: Callable[..., Manifest], changes: dict[str, object], message: str
) -> None:
    run()
    with pytest.raises(DataError, match=message):
        run(**changes)


def test_a_folder_of_another_source_is_refused(run: Callable[..., Manifest], sources: list[str]) -> None:
    run()
    with pytest.raises(DataError, match=r"made from images/00000\.tar, but image shard 0 is now images/00001\.tar"):
        run(given=[sources[1], sources[0], sources[2]])


def test_a_folder_of_another_data_set_is_refused(run: Callable[..., Manifest], tmp_path: Path) -> None:
    run(given=write_tars(tmp_path / "cc3m", (1, 1)))
    with pytest.raises(DataError, match=r"made from cc3m/00000\.tar, but image shard 0 is now cc12m/00000\.tar"):
        run(given=write_tars(tmp_path / "cc12m", (1, 1)))


def test_a_folder_of_more_sources_is_refused(run: Callable[..., Manifest], sources: list[str]) -> None:
    run()
    with pytest.raises(DataError, match=r"holds 000002\.tar, which none of the 2 image shards becomes"):
        run(given=sources[:2])


def test_a_damaged_record_is_refused(run: Callable[..., Manifest], tmp_path: Path) -> None:
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "000000.json").write_text('{"settings": {}}')
    with pytest.raises(DataError, match=r"000000\.json is damaged: no field"):
        run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draws": -1}, "--draws -1"),
        ({"temperature": 0.0}, "--temperature 0.0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"transform": "crop"}, "unknown transform 'crop'"),
        ({"precision": "fp8"}, "--precision fp8: use one of fp32, bf16, fp16"),
    ],
)
def test_wrong_settings_are_refused(rqvae: RQVAE, changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        code_settings(rqvae, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_script("tools/pretokenize.py")


def test_the_command_makes_a_folder_that_carries_its_rqvae(
    tool: ModuleType, rqvae: RQVAE, sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_rqvae(rqvae, tmp_path / "rqvae")
    output = tmp_path / "codes"
    pattern = str(Path(sources[0]).parent / "*.tar")
    options = ["--rqvae", str(tmp_path / "rqvae"), "--output", str(output), "--device", "cpu", "--draws", "1"]
    threads = torch.get_num_threads()
    try:
        tool.main([*options, "--data", pattern, "--threads", "2"])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    codes = CodeShards.open(output)
    assert codes.settings.threads == 2
    codes.check_fingerprint(fingerprint(load_rqvae(output)))
    printed = capsys.readouterr().out
    assert "21 samples in 3 shards" in printed and "perplexity of Q at temperature 0.5, depth 1 to 3: " in printed
    assert json.loads((output / "manifest.json").read_text())["perplexity"] == list(codes.manifest.perplexity)


def test_the_command_names_a_missing_shard(tool: ModuleType, sources: list[str], tmp_path: Path) -> None:
    shutil.rmtree(Path(sources[0]).parent)
    with pytest.raises(DataError, match="missing shard"):
        tool.main(["--rqvae", str(tmp_path), "--data", sources[0], "--output", str(tmp_path / "codes")])


def test_a_compiled_encoder_makes_the_same_codes(
    run: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, compile_ = [], torch.compile

    def traced(network: Any, **options: Any) -> Any:
        compiled.append(network)
        return compile_(network, backend="eager", **options)  # graphs are captured, and run as they are

    monkeypatch.setattr(torch, "compile", traced)
    run("plain")
    assert not compiled
    run("compiled", compiled=True)
    assert len(compiled) == 1
    for name, data in contents(tmp_path / "plain").items():
        assert name == "manifest.json" or contents(tmp_path / "compiled")[name] == data
