"""The benchmark of sampling: what it builds, that both ways of drawing are the same drawing, and what it writes."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from scripts import load_script

from megarq.config.load import load_config
from megarq.errors import ConfigError
from megarq.inference.generator import ImageGenerator
from megarq.inference.sampling import Draws, Guidance, sample_codes
from megarq.inference.settings import depth_settings
from megarq.planning.sampling import codes_work, decoding_work

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
DEMO = ["--model", "demo", "--rqvae", "rqvae-demo", "--device", "cpu", "--warm-up", "0", "--repeats", "2"]
SPEEDS = ["--bandwidth", "20", "--peak", "0.5"]


@pytest.fixture(scope="module", autouse=True)
def neighbours() -> Iterator[None]:
    """The scripts import each other, as in a process of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


@pytest.fixture(scope="module")
def sampling(neighbours: None) -> ModuleType:
    return load_script("benchmarks/sampling.py")


@pytest.fixture(scope="module")
def device(neighbours: None) -> ModuleType:
    return load_script("benchmarks/device.py")


@pytest.fixture(scope="module")
def report(neighbours: None) -> ModuleType:
    return load_script("benchmarks/sampling_report.py")


@pytest.fixture(scope="module")
def result(sampling: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the demo's models, with three of their 64 full forward passes."""
    path = tmp_path_factory.mktemp("speed") / "result.json"
    naive = ["--compare-naive", "--naive-steps", "3"]
    sampling.main([*DEMO, *SPEEDS, *naive, "--batch-size", "1", "3", "--json", str(path)])
    return json.loads(path.read_text())


def full_forward(sampling: ModuleType, model: Any, cond: torch.Tensor, guidance: Guidance, **drawn: Any) -> Any:
    choose = Draws(model, len(cond), depth_settings(model.config.sizes, **drawn))
    choose.seed(0, range(len(cond)))
    steps = range(model.config.positions * model.config.depth)
    return sampling.draw_by_full_forward(model, cond, choose, guidance, steps)


@pytest.mark.parametrize("drawn", [{"top_k": 1}, {"top_k": 5, "top_p": 0.9}], ids=["greedy", "drawn"])
def test_full_forward_passes_draw_the_codes_that_the_caches_do(sampling, variant, random_inputs, drawn):
    model = variant.transformer
    _, cond = random_inputs(model.config)
    none = Guidance(1.0, torch.zeros(model.config.cond_length, dtype=torch.int64))
    expected = sample_codes(model, cond, **drawn)
    assert drawn["top_k"] == 1 or len(expected.unique()) > 1
    assert torch.equal(full_forward(sampling, model, cond, none, **drawn), expected)


def test_guided_full_forward_passes_draw_the_codes_that_the_caches_do(sampling, build, random_inputs):
    model = build().transformer
    _, cond = random_inputs(model.config)
    guidance = Guidance(3.0, torch.zeros(model.config.cond_length, dtype=torch.int64))
    expected = sample_codes(model, cond, top_k=1, guidance=guidance)
    assert not torch.equal(expected, sample_codes(model, cond, top_k=1))
    assert torch.equal(full_forward(sampling, model, cond, guidance, top_k=1), expected)


def test_steps_are_spread_over_positions_and_depths(sampling):
    steps = sampling.spread(256, 16)
    assert len(steps) == 16 and (steps[0], steps[-1]) == (0, 255)
    assert {step % 4 for step in steps} == {0, 1, 2, 3}
    gaps = [later - step for step, later in pairwise(steps)]
    assert max(gaps) - min(gaps) <= 1
    assert sampling.spread(12, 50) == sampling.spread(12, 12) == list(range(12))
    assert sampling.spread(12, 1) == [0] and sampling.spread(12, 2) == [0, 11]


def asked(sampling: ModuleType, *options: str) -> Any:
    return sampling.configurations(sampling.parse(options))


@pytest.mark.parametrize(("size", "published"), [("large", "imagenet-821m"), ("huge", "imagenet-1.4b")])
def test_sizes_are_the_published_models(sampling, size, published):
    model, rqvae = asked(sampling, "--model", size, "--f", "32", "--d", "4", "--codebook-size", "16384")
    assert model == load_config(published).model
    assert rqvae == load_config("rqvae-8x8x4").model


def test_at_depth_1_the_body_has_all_layers(sampling):
    model, rqvae = asked(sampling, "--model", "huge", "--f", "16", "--d", "1", "--codebook-size", "1024")
    assert (model.body.layers, model.head.layers) == (48, 0)
    assert tuple(model.code_shape) == rqvae.code_shape == (16, 16, 1)
    assert model.sizes == rqvae.sizes == (1024,)
    assert rqvae.channel_multipliers == [1, 1, 2, 2, 4] and rqvae.attention_resolutions == [16]


def test_a_configuration_keeps_what_no_option_changes(sampling):
    model, rqvae = asked(sampling, "--model", "cc3m-654m")
    assert model == load_config("cc3m-654m").model and rqvae.code_shape == (8, 8, 4)
    assert asked(sampling, "--model", "cc3m-654m", "--f", "16", "--d", "2")[0].code_shape == [16, 16, 2]


@pytest.mark.parametrize(("cond", "length"), [("none", 1), ("class", 1), ("text", 32)])
def test_sizes_take_any_condition(sampling, cond, length):
    model, _ = asked(sampling, "--model", "small", "--cond", cond)
    assert (model.condition, model.cond_length) == (cond, length)


def test_weights_are_in_the_form_that_a_model_is_loaded_in(sampling, export, build, tmp_path):
    loaded = ImageGenerator.from_pretrained(export(build(), tmp_path / "model")).transformer
    cpu = torch.device("cpu")
    built = sampling.build_models(loaded.config, build().rqvae.config, cpu, torch.float32).transformer
    assert dict(built.named_parameters()).keys() == dict(loaded.named_parameters()).keys()


def test_speeds_and_shares_are_of_the_seconds_and_the_limit(result):
    model, rqvae = load_config("demo").model, load_config("rqvae-demo").model
    assert [row["batch_size"] for row in result["batches"]] == [1, 3]
    for row in result["batches"]:
        batch, seconds, per_image = row["batch_size"], row["seconds"], row["seconds_per_image"]
        assert [len(each) for each in seconds.values()] == [2, 2, 2]
        assert per_image["codes"] == pytest.approx(sum(seconds["codes"]) / 2 / batch)  # the median of two
        assert row["images_per_second"] == pytest.approx(1 / per_image["both"])
        limit = row["limit_seconds_per_image"]
        assert limit["codes"] == pytest.approx(codes_work(model, batch, batch, 4).seconds(20e9, 0.5e12) / batch)
        assert limit["decoding"] == pytest.approx(decoding_work(rqvae, batch, 4).seconds(20e9, 0.5e12) / batch)
        assert limit["both"] == pytest.approx(limit["codes"] + limit["decoding"])
        assert row["share_of_limit"]["both"] == pytest.approx(limit["both"] / per_image["both"])
    assert result["speeds"]["peak_tflops"] == {"value": 0.5, "origin": "given"}


def test_the_speedup_is_of_the_seconds_of_codes_alone(result):
    for row in result["batches"]:
        ratio = row["full_forward"]["seconds_per_image"] / row["seconds_per_image"]["codes"]
        assert row["ar_speedup_over_full_forward"] == pytest.approx(ratio)


@pytest.mark.parametrize(("steps", "scaled"), [("5", True), ("12", False)])
def test_some_full_forward_passes_are_scaled_to_all_and_say_so(sampling, build, monkeypatch, steps, scaled):
    monkeypatch.setattr(sampling, "timed", lambda run, _: (0.5, run()))
    args = sampling.parse([*DEMO, "--compare-naive", "--naive-steps", steps])
    naive = sampling.measure_full_forward(build().transformer, 2, args)  # of 2 x 2 x 3 codes
    assert naive["seconds_per_image"] == pytest.approx(0.5 / int(steps) * 12 / 2)
    assert (naive["naive_steps"], naive["naive_steps_timed"], naive["naive_scaled"]) == (12, int(steps), scaled)


def test_a_batch_out_of_memory_is_told_and_the_others_go_on(sampling, report, monkeypatch, tmp_path, capsys):
    original = ImageGenerator.sample_codes

    def sample(self: ImageGenerator, cond: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
        if len(cond) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, cond, *args, **settings)

    monkeypatch.setattr(ImageGenerator, "sample_codes", sample)
    out, picture = tmp_path / "new" / "result.json", tmp_path / "speed.png"
    sampling.main([*DEMO, *SPEEDS, "--batch-size", "1", "2", "3", "--json", str(out)])
    rows = json.loads(out.read_text())["batches"]
    assert rows[1] == {"batch_size": 2, "error": "out of memory"}
    assert [row["batch_size"] for row in rows if row.get("seconds_per_image")] == [1, 3]
    assert "batch 2: out of memory" in capsys.readouterr().out
    sampling.main(["--from-json", str(out), str(out), "--figure", str(picture)])
    assert Image.open(picture).format == "PNG"
    figure = report.draw_figure([report.read_result(str(out))])
    values = [f"{row['seconds_per_image']['both']:.3g}" for row in (rows[0], rows[2])]
    assert [text.get_text().strip() for text in figure.axes[0].texts] == [values[0], "out of memory", values[1]]


def test_memory_behind_another_error_is_found_and_other_errors_are_raised(device):
    def capture() -> dict[str, Any]:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def fail() -> dict[str, Any]:
        raise RuntimeError("shapes cannot be multiplied")

    def allocate() -> dict[str, Any]:
        return {"tensor": torch.empty(2**60, dtype=torch.uint8)}

    assert device.within_memory(capture) == device.within_memory(allocate) == {"error": "out of memory"}
    with pytest.raises(RuntimeError, match="shapes"):
        device.within_memory(fail)


def test_peak_memory_is_of_what_was_held_since(device):
    torch.ones(2**26)  # 256 MiB, before
    memory = device.PeakMemory(torch.device("cpu"))
    torch.ones(2**25)
    assert memory.gib() == pytest.approx(1 / 8, abs=1 / 32)


def test_speeds_are_given_or_known_or_measured(device):
    assert device.first_speed(2.0, 3.0, lambda: 4.0) == (2.0, "given")
    assert device.first_speed(None, 3.0, lambda: 4.0) == (3.0, "data sheet")
    assert device.first_speed(None, None, lambda: 4.0) == (4.0, "measured")
    names = {"NVIDIA H100 80GB HBM3": 3350, "NVIDIA H100 PCIe": 2000, "NVIDIA H200": 4800, "NVIDIA X1": None}
    assert {name: device.known_gb_s(name) for name in names} == names


def test_a_copy_counts_what_is_read_and_written(device, monkeypatch):
    monkeypatch.setattr(device, "timed", lambda run, _: (0.5, run()))
    assert device.copied_gb_s(torch.device("cpu"), size=10**6) == pytest.approx(4e-3)
    assert device.multiplied_tflops(torch.device("cpu"), torch.float32, turns=1) == pytest.approx(2 * 2048**3 / 0.5e12)


def test_a_trace_shares_out_the_time_of_a_batch(report, tmp_path):
    matrix = torch.ones(300, 300)
    report.write_trace(tmp_path / "trace.json", lambda: [matrix @ matrix for _ in range(20)], torch.device("cpu"))
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    lines = (tmp_path / "trace.txt").read_text().splitlines()[1:]
    shares = {name: float(share.rstrip("%")) for share, name in (line.split(maxsplit=1) for line in lines)}
    assert next(iter(shares)) == "aten::mm"
    assert list(shares)[-2:] == ["other operators", "no operator at work"]
    assert sum(shares.values()) == pytest.approx(100, abs=1)


REFUSED = {
    "no model": ([], "--model None, --from-json None: give one of the two."),
    "nothing to draw": (["--from-json", "a.json"], "--from-json without --figure: there is nothing to do."),
    "batch size": ([*DEMO, "--batch-size", "4", "0"], "--batch-size 4 0: give whole numbers of 1 or more."),
    "depth": (["--model", "small", "--d", "0"], "--d 0: give whole numbers"),
    "warm-up": ([*DEMO, "--warm-up", "-1"], "--warm-up -1: give 0 or more batches."),
    "peak": ([*DEMO, "--peak", "0"], "--peak 0: give a number above 0."),
    "naive steps": ([*DEMO, "--naive-steps", "4"], "--naive-steps 4 without --compare-naive: give both"),
    "figure": ([*DEMO, "--figure", "a.jpg"], "--figure a.jpg: give a name that ends in .png."),
    "trace": ([*DEMO, "--trace", "a.txt"], "--trace a.txt: give a name that ends in .json."),
    "condition": ([*DEMO, "--cond", "class"], "--cond class: demo has condition text. Leave --cond out."),
    "no RQ-VAE": (["--model", "demo"], "demo has 4x4 codes, the RQ-VAE 8x8: give --rqvae"),
    "another RQ-VAE": (["--model", "cc3m-654m", "--rqvae", "rqvae-demo"], "cc3m-654m has 8x8 codes, the RQ-VAE 4x4"),
    "top-k": ([*DEMO, "--top-k", "0"], "top_k=0: give a whole number"),
    "guidance": (["--model", "small", "--guidance", "3"], "guidance=3.0: the model's condition is class"),
    "name": (["--model", "smal"], "smal: no such file, and no such name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused(sampling, case):
    arguments, message = REFUSED[case]
    with pytest.raises(ConfigError) as refused:
        sampling.main(arguments)
    assert message in str(refused.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": "small"}'])
def test_a_file_of_something_else_is_refused(sampling, tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ConfigError, match=r"other\.json is no.* give a file that --json wrote"):
        sampling.main(["--from-json", str(tmp_path / "other.json"), "--figure", str(tmp_path / "speed.png")])
