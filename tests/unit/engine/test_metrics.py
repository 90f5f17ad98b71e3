"""What a run tells: metrics.jsonl, the console line, TensorBoard."""

import errno
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarq.engine.json_lines import METRICS_FILE
from megarq.engine.metrics import (
    _PEAK_TFLOPS,
    MetricsLog,
    Speed,
    console_line,
    memory_gib,
    past_metrics,
    peak_tflops,
)

VALUES = {
    "loss": 5.8712,
    "image_loss": 6.3123,
    "caption_loss": 1.9049,
    "grad_norm": 0.8312,
    "lr": 3.1e-4,
    "images_per_second": 412.4,
    "mfu": 0.413,
    "memory_gib": 61.04,
}
CPU = torch.device("cpu")


@pytest.fixture
def log(tmp_path: Path):
    """`log(start_step, rank=0)`: a log on the test's folder; all are closed in the end."""
    opened = []

    def open_log(start_step: int = 0, rank: int = 0) -> MetricsLog:
        opened.append(MetricsLog(tmp_path, rank, start_step))
        return opened[-1]

    yield open_log
    for each in opened:
        each.close()


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_the_console_line():
    line = console_line(120, 50000, VALUES, "9h12m")
    assert line == (
        "step 120/50000 | loss 5.871 | img 6.31 txt 1.9 | grad 0.83 | lr 3.1e-4 | 412 img/s | mfu 41% | "
        "mem 61.0 GiB | eta 9h12m"
    )


def test_the_console_line_leaves_out_what_is_unknown():
    values = {**VALUES, "mfu": None, "caption_loss": None}
    line = console_line(1, 2, values, "0s")
    assert "mfu" not in line and "txt" not in line


def test_the_console_line_of_an_rq_vae():
    values = {key: VALUES[key] for key in ("loss", "grad_norm", "lr", "images_per_second", "memory_gib")}
    values |= {"reconstruction_loss": 0.0123, "commitment_loss": 0.5}
    assert "| rec 0.0123 commit 0.5 |" in console_line(1, 2, values, "0s")


@pytest.mark.parametrize(("rate", "shown"), [(1e-3, "1.0e-3"), (0.0, "0.0e0"), (2.5e-10, "2.5e-10"), (1.0, "1.0e0")])
def test_learning_rates_are_short(rate, shown):
    assert f"| lr {shown} |" in console_line(1, 2, {**VALUES, "lr": rate}, "0s")


@pytest.mark.parametrize(
    ("seconds", "steps", "shown"), [(1.0, 12, "12s"), (1.0, 245, "4m05s"), (1.0, 33120, "9h12m"), (0.0, 5, "0s")]
)
def test_the_time_left(monkeypatch, seconds, steps, shown):
    clock = iter([0.0, seconds])
    monkeypatch.setattr("megarq.engine.metrics.time.monotonic", lambda: next(clock))
    speed = Speed()
    assert speed.step() == seconds
    assert speed.eta(steps) == shown


def test_what_is_skipped_is_not_part_of_a_step(monkeypatch):
    clock = iter([0.0, 10.0, 12.0])
    monkeypatch.setattr("megarq.engine.metrics.time.monotonic", lambda: next(clock))
    speed = Speed()
    speed.skip()
    assert speed.step() == 2.0


def test_starts_before_this_one_are_counted(log, tmp_path):
    for restarts in range(3):
        opened = log()
        assert opened.restarts == restarts and log(rank=1).restarts == 0
        opened.event("started", 0)


def test_the_time_of_a_save_stands_in_the_line_after_it(log, tmp_path):
    opened = log()
    opened.write(1, {"loss": 1.0})
    opened.saved(1, 2.34567)
    opened.write(2, {"loss": 1.0})
    opened.write(3, {"loss": 1.0})
    assert [line.get("checkpoint_seconds") for line in lines(tmp_path)] == [None, 2.346, None]


def test_numbers_of_all_ranks_are_histograms_in_tensorboard(log, tmp_path):
    opened = log()
    opened.write(4, {"ranks_step_seconds": [0.5, 0.5, 0.9, 0.5]})
    opened.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (event,) = board.Histograms("ranks_step_seconds")
    found = event.histogram_value
    assert (event.step, found.num, found.min, found.max) == (4, 4, 0.5, pytest.approx(0.9))


def test_a_line_is_on_disk_when_it_is_written(log, tmp_path):
    log().write(1, {"loss": 2.5, "mfu": None})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.5, "mfu": None}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_undefined_numbers_are_null(log, tmp_path, value):
    log().write(1, {"loss": value})
    assert lines(tmp_path) == [{"step": 1, "loss": None}]


def test_steps_after_the_checkpoint_are_dropped(log, tmp_path):
    first = log()
    for step in range(1, 6):
        first.write(step, {"loss": float(step)})
    first.write(5, {"validation_loss": 1.0})
    first.close()
    second = log(3)
    second.write(4, {"loss": 40.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_validation_at_the_checkpointed_step_is_kept(log, tmp_path):
    first = log()
    first.write(3, {"loss": 3.0})
    first.write(3, {"validation_loss": 2.0})
    first.close()
    log(3)
    assert lines(tmp_path) == [{"step": 3, "loss": 3.0}, {"step": 3, "validation_loss": 2.0}]


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2, "loss": {}', "\n", '{"step": 1}x}\n'])
def test_a_line_that_a_kill_tore_is_dropped(log, tmp_path, torn):
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "loss": 1.0}\n' + torn)
    log(2)
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_a_new_run_starts_an_empty_log(log, tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "loss": 1.0}\n')
    log(0)
    assert lines(tmp_path) == []


def test_a_line_that_cannot_be_printed_ends_nothing(log, monkeypatch):
    def full(*line, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.print", full)
    log(0).say("hello")


def test_other_ranks_write_nothing(log, tmp_path, capsys):
    other = log(rank=1)
    other.write(1, {"loss": 1.0})
    other.say("hello")
    other.pictures(1, "pictures", torch.zeros(3, 4, 4), "text")
    other.chart(1, "chart", torch.zeros(3, 4, 4))
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_tensorboard_has_the_same_scalars(log, tmp_path):
    first = log()
    first.write(1, {"loss": 2.5, "mfu": None, "epoch": 0})
    first.write(2, {"loss": 1.5, "epoch": 1})
    first.close()
    found = events(tmp_path)
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 2.5), (2, 1.5)]
    assert found.Tags()["scalars"] == ["loss", "epoch"]


def test_tensorboard_has_pictures_and_their_prompts(log, tmp_path):
    first = log()
    first.pictures(7, "pictures", torch.rand(3, 8, 8), "a seven")
    first.close()
    found = events(tmp_path)
    assert [event.step for event in found.Images("pictures")] == [7]
    assert found.Tags()["tensors"] == ["pictures/prompts/text_summary"]


def test_pictures_are_png_files_too(log, tmp_path):
    log().pictures(120, "pictures", torch.ones(3, 4, 6))
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["step-00000120.png"]
    with Image.open(tmp_path / "pictures" / "step-00000120.png") as image:
        assert image.size == (6, 4) and image.getpixel((0, 0)) == (255, 255, 255)


def test_a_run_that_passes_a_step_again_replaces_its_picture(log, tmp_path):
    for value in (0.0, 1.0):
        log().pictures(5, "pictures", torch.full((3, 4, 4), value))
    with Image.open(tmp_path / "pictures" / "step-00000005.png") as image:
        assert image.getpixel((0, 0)) == (255, 255, 255)


def test_tensorboard_has_charts_and_warnings(log, tmp_path):
    first = log()
    first.chart(4, "code_frequencies", torch.rand(3, 8, 8))
    first.write(4, {"loss": 1.0, "warning": "it diverges"})
    first.close()
    found = events(tmp_path)
    assert [event.step for event in found.Images("code_frequencies")] == [4]
    assert found.Tags()["tensors"] == ["warning/text_summary"]
    assert lines(tmp_path)[0]["warning"] == "it diverges"
    assert not (tmp_path / "pictures").exists()


def test_past_metrics_end_with_the_step_that_a_run_goes_on_from(log, tmp_path):
    first = log()
    for step in (1, 2, 3):
        first.write(step, {"loss": float(step)})
    assert list(past_metrics(tmp_path, 2)) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
    assert list(past_metrics(tmp_path / "elsewhere", 2)) == []


def test_memory_of_a_cpu_process_is_known():
    assert 0.01 < memory_gib(CPU) < 1000


def test_the_peak_is_as_configured_or_unknown_on_a_cpu():
    assert peak_tflops(CPU, 1.5, "bf16") == 1.5
    assert peak_tflops(CPU, None, "bf16") is None


@pytest.mark.parametrize(("products", "peak"), [("bf16", 989.0), ("tf32", 494.5), ("fp32", 67.0)])
def test_the_peak_of_a_gpu_is_that_of_what_it_multiplies_in(monkeypatch, products, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_tflops(torch.device("cuda"), None, products) == peak
    assert peak_tflops(torch.device("cuda"), 1.5, products) == 1.5


def test_every_known_gpu_has_a_peak_for_all_that_it_multiplies_in():
    assert all({*peaks} == {"bf16", "tf32", "fp32"} for peaks in _PEAK_TFLOPS.values())
    assert all(peaks["bf16"] > peaks["tf32"] >= peaks["fp32"] for peaks in _PEAK_TFLOPS.values())


class Monitor:
    """Takes events, or fails as a service does that is away."""

    def __init__(self, fails: bool) -> None:
        self.events, self._fails = [], fails

    def write_events(self, events: list[tuple]) -> None:
        self.events += events
        if self._fails:
            raise ConnectionError("no route to host")


def test_a_monitor_is_given_all_numbers(tmp_path):
    monitor = Monitor(fails=False)
    log = MetricsLog(tmp_path, 0, 0, monitor)
    log.write(4, {"loss": 1.5, "mfu": None, "note": "words"})
    log.close()
    assert monitor.events == [("loss", 1.5, 4)]


def test_a_monitor_that_fails_is_told_of_once_and_left_alone(tmp_path, capsys):
    monitor = Monitor(fails=True)
    log = MetricsLog(tmp_path, 0, 0, monitor)
    for step in (1, 2):
        log.write(step, {"loss": 1.5})
    log.close()
    assert len(monitor.events) == 1 and len(lines(tmp_path)) == 2
    assert capsys.readouterr().out.count("monitor failed (no route to host)") == 1
