"""What benchmarks/sampling.py shows of its results: lines, a figure, and where the time of a batch goes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from device import timed
from torch.autograd import DeviceType

from megarq.errors import ConfigError
from megarq.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPERATORS = 15
"""Named in the table of a trace."""


def describe_run(result: dict[str, Any]) -> str:
    """What is measured, and against what."""
    speeds = [f"{name} {speed['value']:.4g} ({speed['origin']})" for name, speed in result["speeds"].items()]
    return (
        f"{_label(result)} codes of {result['codebook_size']:,}, condition {result['condition']}, {result['dtype']}: "
        f"{result['device']}, torch {result['machine']['torch']}, {result['threads']} threads\n{'; '.join(speeds)}"
    )


def describe_batch(row: dict[str, Any]) -> str:
    """A batch size in a line; full forward passes in another."""
    text = f"batch {row['batch_size']}: {row.get('error')}"
    if "error" not in row:
        seconds, share = row["seconds_per_image"], row["share_of_limit"]
        text = (
            f"batch {row['batch_size']}: {seconds['both']:.4g} s/image (codes {seconds['codes']:.4g}, decoding "
            f"{seconds['decoding']:.4g}), {row['images_per_second']:.4g} images/s, {share['both']:.0%} of the limit "
            f"(codes {share['codes']:.0%}), {row['peak_memory_gib']:.2f} GiB"
        )
    naive = row.get("full_forward", {})
    if "error" in naive:
        text += f"\n  full forward passes: {naive['error']}"
    elif naive:
        timed_steps = f"{naive['naive_steps_timed']} of {naive['naive_steps']} steps timed"
        text += f"\n  full forward passes: {naive['seconds_per_image']:.4g} s/image for codes ({timed_steps})"
    if "ar_speedup_over_full_forward" in row:
        text += f", {row['ar_speedup_over_full_forward']:.3g} times the time"
    return text


def write_trace(path: Path, run: Callable[[], Any], device: torch.device) -> None:
    """Profile a second run, and write beside its trace what share of its time each operator had for itself."""
    run()
    with torch.profiler.profile() as profiler:
        seconds, _ = timed(run, device)
    profiler.export_chrome_trace(str(path))
    on_gpu = device.type == "cuda"  # there the kernels count, not the operators that launch them
    spent = {
        average.key: (average.self_device_time_total if on_gpu else average.self_cpu_time_total) / 1e6 / seconds
        for average in profiler.key_averages()
        if (average.device_type == DeviceType.CUDA) == on_gpu
    }
    shares = dict(sorted(spent.items(), key=lambda pair: -pair[1])[:OPERATORS])
    shares["other operators"] = sum(spent.values()) - sum(shares.values())
    shares["no operator at work"] = 1 - sum(spent.values())
    lines = [f"{share:7.1%}  {name}" for name, share in shares.items()]
    write_atomically(path.with_suffix(".txt"), "\n".join([f"of {seconds:.3f} s, profiled", *lines, ""]))


def read_result(path: str) -> dict[str, Any]:
    """What --json wrote. Raises ConfigError for another file."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): give a file that --json wrote.") from error
    if not isinstance(result, dict) or not {"model", "code_shape", "batches"} <= result.keys():
        raise ConfigError(f"{path} is no result of this benchmark: give a file that --json wrote.")
    return result


def draw_figure(results: Sequence[dict[str, Any]]) -> "Figure":
    """Seconds per image over batch sizes, a bar for each result, in which decoding stands on codes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--figure without matplotlib, which is missing: run pip install matplotlib.") from error
    sizes = sorted({row["batch_size"] for result in results for row in result["batches"]})
    figure, width = Figure(figsize=(2 + 1.6 * len(sizes), 4), layout="constrained"), 0.8 / len(results)
    axes = figure.add_subplot()
    for index, result in enumerate(results):
        label, color = _label(result), f"C{index}"
        for part, alpha in (("codes", 1.0), ("decoding", 0.5)):
            axes.bar([0], [0], color=color, alpha=alpha, label=f"{label}: {part}")  # for the legend
        for row in result["batches"]:
            x = sizes.index(row["batch_size"]) + (index - (len(results) - 1) / 2) * width
            if "error" in row:
                axes.text(x, 0, f" {row['error']}", rotation=90, ha="center", va="bottom", color=color)
                continue
            seconds = row["seconds_per_image"]
            axes.bar(x, seconds["codes"], width, color=color)
            axes.bar(x, seconds["decoding"], width, seconds["codes"], color=color, alpha=0.5)
            axes.text(x, seconds["both"], f"{seconds['both']:.3g}", ha="center", va="bottom")
    axes.set(xticks=range(len(sizes)), xticklabels=sizes, xlabel="batch size", ylabel="seconds per image")
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    figure.legend(loc="outside upper center", ncols=len(results))
    return figure


def _label(result: dict[str, Any]) -> str:
    return f"{result['model']} {'x'.join(map(str, result['code_shape']))}"
